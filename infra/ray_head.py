"""A Ray head on loopback with a token of its own: for one flow process, or for `foreframe up`.

`ray start` listens on the machine's outer address unless it is told otherwise twice, and `ray stop` would end every
Ray of the machine; so the head runs in the foreground of a session that we start and stop.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from infra.errors import ServiceError
from infra.processes import end_with_parent, free_port, identify, stop, tail, wait_for
from infra.settings import QUIET_ENVIRONMENT

START_TIMEOUT_S = 120.0
OBJECT_STORE_BYTES = 300 << 20  # no pixels travel through the object store
STARTED_LINE = "Ray runtime started"


@contextlib.contextmanager
def local_ray(num_cpus: int) -> Iterator[str]:
    """One small Ray head, without dashboard, for the length of the block; yields its address.

    Exports `RAY_ADDRESS` and the token, so every child of this process joins it; it ends with this process whatever
    happens. Where `RAY_ADDRESS` is set already, that cluster is used and left alone.
    """
    if existing := os.environ.get("RAY_ADDRESS"):
        yield existing
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="foreframe-ray-")))
        credentials = client_environment(write_token(folder / "token"))
        try:
            address = stack.enter_context(_head(folder / "head.log", num_cpus, credentials))
        except ServiceError:
            # Ray waits 30 s for its own node, which a busy machine may exceed once.
            address = stack.enter_context(_head(folder / "second-head.log", num_cpus, credentials))
        stack.enter_context(_exported({"RAY_ADDRESS": address, **credentials}))
        yield address


@contextlib.contextmanager
def _head(log_path: Path, num_cpus: int, credentials: dict[str, str]) -> Iterator[str]:
    port = free_port()
    with log_path.open("ab") as stream:
        head = subprocess.Popen(
            head_argv(port, num_cpus),
            cwd=log_path.parent,
            env=head_environment(credentials),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509  (one system call; libc was loaded before)
        )
    process = identify(head.pid)
    try:
        wait_started(log_path, lambda: head.poll() is None)
        yield f"127.0.0.1:{port}"
    finally:
        if process:
            stop(process)
        head.wait()


def wait_started(log_path: Path, running: Callable[[], bool]) -> None:
    """Return when the head says that it is up; `ServiceError` with its last words otherwise."""
    wait_for(lambda: STARTED_LINE in _text(log_path) or not running(), timeout_s=START_TIMEOUT_S, every_s=0.2)
    if STARTED_LINE not in _text(log_path):
        raise ServiceError(f"the Ray head did not start: {tail(log_path)}.", remedy=f"See {log_path}.")


def client_environment(token_path: Path) -> dict[str, str]:
    """What the head and every process that joins it need before they import `ray`: the token, and loopback addresses.

    Ray replaces a loopback address by the machine's outer one unless clusters are switched off by this odd name.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def head_argv(port: int, num_cpus: int, *, dashboard_port: int | None = None) -> list[str]:
    """Command line of a Ray head on loopback that stays in the foreground; every port it needs is chosen free."""
    argv = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    argv += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={num_cpus}"]
    argv += ["--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={free_port()}"]
    argv += [f"--dashboard-agent-listen-port={free_port()}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    argv += [f"--include-dashboard={'true' if dashboard_port else 'false'}"]
    return argv + (["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"] if dashboard_port else [])


def head_environment(credentials: dict[str, str]) -> dict[str, str]:
    """Environment of a Ray head, which its jobs inherit: `python` is this interpreter."""
    environment = {**os.environ, **{k: os.environ.get(k, v) for k, v in QUIET_ENVIRONMENT.items()}}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment.pop("RAY_ADDRESS", None)
    return environment | credentials


def write_token(path: Path) -> Path:
    """A new random Ray token in a file that only this user reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_hex(32))
    return path


@contextlib.contextmanager
def _exported(variables: dict[str, str]) -> Iterator[None]:
    previous = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in previous.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
