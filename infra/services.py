"""`foreframe up` and `down`: Prefect server and worker, MLflow, a Ray head with dashboard, all on loopback.

Everything lives in `<home>/services`: logs, Prefect's database, Ray's token, and `state.json`, which names every
process by pid and start time, and the settings that later commands read (`infra.settings`). `down` stops those
processes and no others. Prefect is only run as a program here; deployments and profile are the pipelines' business.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from infra.config import Config
from infra.errors import ServiceError
from infra.processes import ProcessId, free_port, is_alive, spawn, stop, tail, wait_for
from infra.ray_head import client_environment, head_argv, head_environment, write_token
from infra.settings import QUIET_ENVIRONMENT, ServiceSettings, services_folder, settings, state_path
from infra.storage import write_json

log = logging.getLogger(__name__)

POOL = "foreframe"
WORKER_LIMIT = 4
START_TIMEOUT_S = 300.0
STOP_GRACE_S = 20.0
RAY_ATTEMPTS = 3
PREFECT_PORT, MLFLOW_PORT, RAY_PORT = 4200, 5000, 8265
# In which order they end: those that use others first.
STOP_ORDER = ("prefect-worker", "ray", "prefect-server", "mlflow")


class Service(Config):
    """A process `up` started."""

    process: ProcessId
    url: str = ""  # what the user opens; empty for the worker
    log_path: str


class State(Config):
    """`state.json`."""

    settings: ServiceSettings = ServiceSettings()
    services: dict[str, Service] = Field(default_factory=dict)
    previous_profile: str | None = None  # Prefect profile that was active before; None: ours was not written
    is_deployed: bool = False

    @property
    def is_running(self) -> bool:
        """Whether every service still runs."""
        return set(self.services) == set(STOP_ORDER) and all(is_alive(item.process) for item in self.services.values())


def read_state() -> State | None:
    """The state of the last `up`, None when there is none."""
    path = state_path()
    if not path.is_file():
        return None
    try:
        return State.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ServiceError(f"{path} is damaged: {error.error_count()} errors.", remedy="Delete it.") from None


def write_state(state: State) -> None:
    """Replace `state.json`."""
    write_json(state_path(), state.to_json())


def up(*, num_cpus: int | None = None) -> State:
    """Start what is not running and return when all of it is healthy; already up is fine.

    Raises `ServiceError` with the end of the log of the service that did not start, after stopping the others.
    """
    folder = services_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        state = read_state()
        if state is not None and state.is_running:
            log.info("already up")
            return state
        if state is not None:
            _stop_all(state)
        starter = _Starter(folder, previous_profile=state.previous_profile if state else None)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(lambda: _forget(starter.state))
            started = starter.start(num_cpus or os.cpu_count() or 1)
            on_failure.pop_all()  # all is well: nothing to undo
        return started


def _forget(state: State) -> None:
    """Stop what was started so far, and leave no trace of it."""
    _stop_all(state)
    state_path().unlink(missing_ok=True)


def down() -> list[str]:
    """Stop what `up` started and forget it; returns the names of the services that were still running."""
    folder = services_folder()
    if not folder.is_dir():
        return []
    with _lock(folder):
        state = read_state()
        if state is None:
            return []
        stopped = _stop_all(state)
        state_path().unlink(missing_ok=True)
        (folder / "ray-token").unlink(missing_ok=True)
        return stopped


def environment(state_settings: ServiceSettings) -> dict[str, str]:
    """Variables of a process that uses the services: what the worker gets, and what a shell may export."""
    known = settings()
    variables = {
        "FOREFRAME_HOME": known.home_url,
        "FOREFRAME_BACKEND": "jobs",
        "FOREFRAME_TRACKING_URI": state_settings.tracking_uri,
        "FOREFRAME_RAY_DASHBOARD_URL": state_settings.ray_dashboard_url,
        "FOREFRAME_RAY_TOKEN_PATH": state_settings.ray_token_path,
        "PREFECT_API_URL": state_settings.prefect_api_url,
    }
    return {**variables, **client_environment(Path(state_settings.ray_token_path))}


class _Starter:
    """Starts the services one after the other and waits for all; `state` always names what has been started."""

    def __init__(self, folder: Path, *, previous_profile: str | None) -> None:
        self.folder = folder
        self.base = _base_environment(folder)
        self.state = State(previous_profile=previous_profile)

    def start(self, num_cpus: int) -> State:
        """All four, healthy."""
        mlflow = f"http://127.0.0.1:{free_port(MLFLOW_PORT)}"
        prefect = f"http://127.0.0.1:{free_port(PREFECT_PORT)}"
        dashboard = free_port(RAY_PORT)
        token = write_token(self.folder / "ray-token")
        found = ServiceSettings(
            tracking_uri=mlflow,
            ray_dashboard_url=f"http://127.0.0.1:{dashboard}",
            ray_token_path=str(token),
            prefect_api_url=f"{prefect}/api",
        )
        self.state = self.state.model_copy(update={"settings": found})
        self._spawn("prefect-server", _prefect_argv("server", "start", *_host_port(prefect)), self.base, prefect)
        self._spawn("mlflow", _mlflow_argv(mlflow, settings().home_url), self.base, mlflow)
        self._wait("prefect-server", lambda: _answers(f"{found.prefect_api_url}/health"))
        self._wait("mlflow", lambda: _answers(f"{mlflow}/health"))
        # Not all at once: a Ray node gives itself 30 s to start, which a busy machine exceeds.
        self._start_ray(dashboard, num_cpus, token)
        worker = _prefect_argv("worker", "start", "--pool", POOL, "--type", "process", "--limit", str(WORKER_LIMIT))
        self._spawn("prefect-worker", worker, self.base | environment(found), "")
        self._wait("prefect-worker", lambda: _answers(f"{found.prefect_api_url}/work_pools/{POOL}"))
        return self.state

    def _start_ray(self, dashboard: int, num_cpus: int, token: Path) -> None:
        url = f"http://127.0.0.1:{dashboard}"
        bearer = {"Authorization": f"Bearer {token.read_text()}"}
        for attempt in range(1, RAY_ATTEMPTS + 1):
            argv = head_argv(free_port(), num_cpus, dashboard_port=dashboard)
            self._spawn("ray", argv, head_environment(client_environment(token)), url)
            try:
                self._wait("ray", lambda: _answers(f"{url}/api/jobs/", headers=bearer))
            except ServiceError:
                stop(self.state.services["ray"].process)
                if attempt == RAY_ATTEMPTS:
                    raise
                log.warning("the Ray head did not start, attempt %d of %d", attempt, RAY_ATTEMPTS)
            else:
                return

    def _spawn(self, name: str, argv: list[str], env: Mapping[str, str], url: str) -> None:
        log_path = self.folder / f"{name}.log"
        log_path.unlink(missing_ok=True)
        process = spawn(argv, log_path=log_path, env=env, cwd=self.folder)
        service = Service(process=process, url=url, log_path=str(log_path))
        self.state = self.state.model_copy(update={"services": {**self.state.services, name: service}})
        # At once: a killed `up` must leave a trace that `down` can follow.
        write_state(self.state)

    def _wait(self, name: str, healthy: Callable[[], bool]) -> None:
        service = self.state.services[name]
        started = time.monotonic()
        wait_for(lambda: healthy() or not is_alive(service.process), timeout_s=START_TIMEOUT_S, every_s=0.5)
        if not is_alive(service.process) or not healthy():
            ended = "ended" if not is_alive(service.process) else f"was not healthy within {START_TIMEOUT_S:g} s"
            raise ServiceError(f"{name} {ended}: {tail(Path(service.log_path))}.", remedy=f"See {service.log_path}.")
        log.info("%s is up (waited %.0f s) %s", name, time.monotonic() - started, service.url)


def _base_environment(folder: Path) -> dict[str, str]:
    """Quiet, on loopback even behind a proxy, and with Prefect's files in our folder, not in the user's."""
    env = {**os.environ, **{key: os.environ.get(key, value) for key, value in QUIET_ENVIRONMENT.items()}}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    env["NO_PROXY"] = ",".join(filter(None, [env.get("NO_PROXY", ""), "127.0.0.1", "localhost"]))
    env["PREFECT_HOME"] = str(folder / "prefect")
    env["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{folder / 'prefect.db'}"
    env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven idle consumers of 60 MB
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_API_KEY", "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        env.pop(name, None)
    return env


def _prefect_argv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", "--no-prompt", *arguments]


def _mlflow_argv(url: str, home_url: str) -> list[str]:
    # Artifacts are not proxied: what is written through the server stays readable without it.
    root = f"{home_url}/mlflow-artifacts"
    database = f"sqlite:///{settings().local_home / 'mlflow.db'}"
    argv = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--no-serve-artifacts"]
    return [*argv, "--default-artifact-root", root, "--workers", "1", *_host_port(url)]


def _host_port(url: str) -> tuple[str, ...]:
    host, _, port = url.removeprefix("http://").partition(":")
    return ("--host", host, "--port", port)


def _answers(url: str, *, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a GET is answered with 200; never through a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=dict(headers or {}))  # noqa: S310  (our own loopback address)
    try:
        with opener.open(request, timeout=10.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _stop_all(state: State) -> list[str]:
    stopped = []
    for name in STOP_ORDER:
        service = state.services.get(name)
        if service is not None and stop(service.process, grace_s=STOP_GRACE_S):
            stopped.append(name)
    return stopped


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One `up` or `down` at a time; freed by the kernel when its holder dies."""
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError("another `foreframe up` or `down` is at work.", remedy="Wait for it.") from None
        yield
