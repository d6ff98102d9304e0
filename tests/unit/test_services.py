"""Processes are known by more than their pid; settings believe a state file only while its processes live."""

import json
import os
import subprocess
import sys
import time

import pytest

from infra import services
from infra.errors import ServiceError
from infra.processes import ProcessId, family, free_port, identify, is_alive, spawn, stop
from infra.settings import settings
from tests.fixtures_services import is_running, wait_for_file, wait_gone

FAMILY = """
import os, pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
# A child of the same session, one in a session of its own, and an orphan.
for name, code in (("child", ""), ("session", "os.setsid()"), ("orphan", "os.fork() and os._exit(0)")):
    subprocess.Popen([sys.executable, "-c", f"import os, time, pathlib; {code}\\n"
        f"pathlib.Path({str(folder / name)!r}).write_text(str(os.getpid())); time.sleep(100)"])
time.sleep(100)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FOREFRAME_HOME", str(tmp_path))
    for name in ("TRACKING_URI", "RAY_DASHBOARD_URL", "RAY_TOKEN_PATH", "PREFECT_API_URL"):
        monkeypatch.delenv(f"FOREFRAME_{name}", raising=False)
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


def sleeper(folder, seconds=100) -> ProcessId:
    argv = [sys.executable, "-c", f"import time; time.sleep({seconds})"]
    return spawn(argv, log_path=folder / "log", env=dict(os.environ), cwd=folder)


def test_stop_ends_children_sessions_and_orphans(tmp_path):
    leader = spawn(
        [sys.executable, "-c", FAMILY, str(tmp_path)], log_path=tmp_path / "log", env=dict(os.environ), cwd=tmp_path
    )
    names = ("child", "session", "orphan")
    for name in names:
        wait_for_file(tmp_path / name)
    time.sleep(0.2)
    pids = [int((tmp_path / name).read_text()) for name in names]
    assert {leader.pid, *pids} <= {member.pid for member in family(leader)}
    assert stop(leader, grace_s=5)
    for pid in (leader.pid, *pids):
        wait_gone(pid)


def test_a_stranger_under_the_same_pid_is_left_alone(tmp_path):
    mine = sleeper(tmp_path)
    stranger = ProcessId(pid=mine.pid, started="another boot-1")
    assert not is_alive(stranger)
    assert not stop(stranger)
    assert is_running(mine.pid)
    assert stop(mine)
    assert not stop(mine)


def test_a_free_port_is_not_the_one_in_use():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def write_state(home, process: ProcessId | None) -> None:
    service = {"process": process.to_json() if process else {"pid": 1, "started": "never"}, "url": "", "log_path": ""}
    state = {
        "settings": {"tracking_uri": "http://127.0.0.1:5001", "ray_dashboard_url": "http://127.0.0.1:8266"},
        "services": {"mlflow": service, "ray": {**service, "process": {"pid": 1, "started": "never"}}},
    }
    (home / "services").mkdir(exist_ok=True)
    (home / "services/state.json").write_text(json.dumps(state))


def test_settings_come_from_services_that_run_and_from_no_others(home, monkeypatch):
    mine = identify(os.getpid())
    write_state(home, mine)
    assert settings().mlflow_uri == "http://127.0.0.1:5001"
    assert settings().ray_dashboard_url == "", "Ray does not run"
    settings.cache_clear()
    monkeypatch.setenv("FOREFRAME_TRACKING_URI", "sqlite:///mine.db")
    assert settings().mlflow_uri == "sqlite:///mine.db", "the environment wins"
    settings.cache_clear()
    monkeypatch.delenv("FOREFRAME_TRACKING_URI")
    write_state(home, None)
    assert settings().mlflow_uri == f"sqlite:///{home}/mlflow.db"


def test_a_service_that_does_not_start_is_named_and_the_others_are_stopped(home, monkeypatch):
    monkeypatch.setattr(services, "START_TIMEOUT_S", 20.0)
    monkeypatch.setattr(services, "_prefect_argv", lambda *_: [sys.executable, "-c", "raise SystemExit('no database')"])
    monkeypatch.setattr(services, "_mlflow_argv", lambda *_: [sys.executable, "-c", "import time; time.sleep(99)"])
    started: list[ProcessId] = []
    monkeypatch.setattr(services, "spawn", lambda *a, **k: started.append(spawn(*a, **k)) or started[-1])
    with pytest.raises(ServiceError, match=r"prefect-server.*no database"):
        services.up()
    assert len(started) == 2
    for process in started:
        wait_gone(process.pid)
    assert services.read_state() is None


def test_down_without_up_stops_nothing(home):
    assert services.down() == []


def test_two_commands_do_not_work_at_the_same_time(home):
    (home / "services").mkdir()
    code = (
        "import fcntl, sys, time; stream = open(sys.argv[1], 'w')\n"
        "fcntl.flock(stream, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", code, str(home / "services/lock")]
    holder = subprocess.Popen(argv, stdout=subprocess.PIPE)
    holder.stdout.readline()
    try:
        with pytest.raises(ServiceError, match="at work"):
            services.down()
    finally:
        holder.kill()
        holder.wait()
    assert services.down() == []
