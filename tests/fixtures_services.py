"""A Ray head with a dashboard and a token, and a step that says what it does: for tests of the backends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.processes import free_port, spawn, stop, wait_for
from infra.ray_head import client_environment, head_argv, head_environment, wait_started, write_token
from infra.settings import settings

STEP = '''
"""A step as the mains are: run(config) in process, or `python -m marker_step CONFIG.json`."""
import json, os, pathlib, sys, time

def run(config):
    work(config.to_json())

def work(config):
    folder = pathlib.Path(config["folder"])
    with (folder / "started.txt").open("a") as stream:
        stream.write(f"{os.getpid()}\\n")
    print("working with", os.environ.get("FOREFRAME_BACKEND"), os.environ.get("MARKER"), flush=True)
    if config["use_ray"]:
        import ray
        ray.init(log_to_driver=False)
        print("ray says", ray.get(ray.remote(lambda: 40 + 2).remote()), flush=True)
    for line in range(config["lines"]):
        print("line", line, flush=True)
    deadline = time.time() + config["seconds"]
    while time.time() < deadline and not (folder / "go").exists():
        time.sleep(0.1)
    if config["exit_code"] == 2:
        print("value 7 is wrong. Use 8.", file=sys.stderr)
    if config["exit_code"]:
        sys.exit(config["exit_code"])
    (folder / "done.txt").write_text("done")

if __name__ == "__main__":
    work(json.loads(pathlib.Path(sys.argv[1]).read_text()))
'''


@dataclass(frozen=True)
class RayHead:
    """A running head."""

    dashboard_url: str
    token_path: Path
    pid: int


@pytest.fixture
def marker_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder whose `marker_step.py` is importable here and in children; the home folder lies beside it."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "marker_step.py").write_text(STEP)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("FOREFRAME_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield folder
    settings.cache_clear()


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """One head with dashboard for the session."""
    folder = tmp_path_factory.mktemp("ray-head")
    token = write_token(folder / "token")
    port, dashboard = free_port(), free_port()
    process = spawn(
        head_argv(port, 2, dashboard_port=dashboard),
        log_path=folder / "head.log",
        env=head_environment(client_environment(token)),
        cwd=folder,
    )
    try:
        wait_started(folder / "head.log", lambda: True)
        yield RayHead(f"http://127.0.0.1:{dashboard}", token, process.pid)
    finally:
        stop(process)


@pytest.fixture
def jobs_settings(ray_head: RayHead, marker_step: Path, monkeypatch: pytest.MonkeyPatch) -> RayHead:
    """Settings that point at the head."""
    monkeypatch.setenv("FOREFRAME_RAY_DASHBOARD_URL", ray_head.dashboard_url)
    monkeypatch.setenv("FOREFRAME_RAY_TOKEN_PATH", str(ray_head.token_path))
    monkeypatch.setenv("FOREFRAME_BACKEND", "jobs")
    settings.cache_clear()
    return ray_head


def wait_for_file(path: Path, *, timeout_s: float = 30.0) -> None:
    """Fails the test when the file does not appear, or stays empty."""
    appeared = wait_for(lambda: path.is_file() and path.stat().st_size > 0, timeout_s=timeout_s)
    assert appeared, f"{path} did not appear"


def is_running(pid: int) -> bool:
    """Whether somebody runs under the pid, a zombie not counted."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):  # it may go between the two
        return False


def wait_gone(pid: int, *, timeout_s: float = 20.0) -> None:
    """Fails the test when the process stays."""
    deadline = time.monotonic() + timeout_s
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.1)
