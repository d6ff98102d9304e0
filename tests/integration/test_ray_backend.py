"""Steps inline, as children and as Ray jobs: one outcome, exact ids, nothing left running."""

import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra.config import Config
from infra.errors import ForeframeError
from infra.processes import free_port, wait_for
from pipelines.ray_backend import LineForwarder, StepContext, StepCrashedError, StepError, run_step
from tests.fixtures_services import is_running, wait_for_file, wait_gone


class MarkerConfig(Config):
    kind: str = "marker"
    folder: str
    seconds: float = 0.0
    exit_code: int = 0
    lines: int = 0
    use_ray: bool = False


@pytest.fixture
def context(marker_step: Path) -> StepContext:
    return StepContext(run_key=str(uuid.uuid4()), env={"MARKER": "m1", "PYTHONPATH": str(marker_step)})


def started_pids(folder: Path) -> list[int]:
    path = folder / "started.txt"
    return [int(line) for line in path.read_text().split()] if path.is_file() else []


def run_in_thread(config: MarkerConfig, context: StepContext, backend: str) -> tuple[threading.Thread, list[Exception]]:
    errors: list[Exception] = []

    def target() -> None:
        try:
            run_step("marker_step", config, name="mark", backend=backend, context=context)
        except ForeframeError as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    return thread, errors


def test_inline_runs_in_this_process(tmp_path, marker_step):
    run_step("marker_step", MarkerConfig(folder=str(tmp_path)), name="mark", backend="inline")
    assert started_pids(tmp_path) == [os.getpid()]


def test_local_child_reads_its_config_and_its_lines_come_through(tmp_path, context, caplog):
    caplog.set_level(logging.INFO)
    run_step("marker_step", MarkerConfig(folder=str(tmp_path)), name="mark", backend="local", context=context)
    assert (tmp_path / "done.txt").is_file()
    assert started_pids(tmp_path) != [os.getpid()]
    assert "working with inline m1" in caplog.text


def test_exit_code_2_is_final_and_carries_the_sentence(tmp_path, context):
    with pytest.raises(StepError, match=r"value 7 is wrong\. Use 8\.") as caught:
        run_step("marker_step", MarkerConfig(folder=str(tmp_path), exit_code=2), name="mark", context=context)
    assert not caught.value.retryable


def test_any_other_exit_code_may_be_retried(tmp_path, context):
    with pytest.raises(StepCrashedError, match="exit code 7") as caught:
        run_step("marker_step", MarkerConfig(folder=str(tmp_path), exit_code=7), name="mark", context=context)
    assert caught.value.retryable


def hear_interrupts() -> None:
    """A suite started in the background of a shell ignores SIGINT, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_killing_the_flow_process_ends_its_child(tmp_path, context, marker_step):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.integration.test_ray_backend import MarkerConfig\n"
        "from pipelines.ray_backend import run_step\n"
        "run_step('marker_step', MarkerConfig(folder=sys.argv[1], seconds=60), name='mark', backend='local')\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path), str(marker_step)]
    for number in (signal.SIGKILL, signal.SIGINT):
        parent = subprocess.Popen(
            argv,
            cwd=Path(__file__).parents[2],
            stderr=subprocess.DEVNULL,
            preexec_fn=hear_interrupts,  # noqa: PLW1509  (one system call)
        )
        wait_for_file(tmp_path / "started.txt")
        child = started_pids(tmp_path)[0]
        (tmp_path / "started.txt").unlink()
        assert is_running(child)
        parent.send_signal(number)
        parent.wait(30)
        wait_gone(child)


def test_a_flood_of_lines_is_throttled_but_its_end_is_kept(caplog):
    caplog.set_level(logging.INFO)
    forwarder = LineForwarder(logging.getLogger("flood"))
    for number in range(5000):
        forwarder.line(f"line {number}")
    forwarder.close()
    assert len(caplog.records) < 100
    assert forwarder.final_line == "line 4999"
    assert "lines left out" in caplog.text


@pytest.mark.ray
def test_children_share_one_local_ray_that_ends_with_the_block(tmp_path, context, caplog):
    from infra.ray_head import local_ray

    caplog.set_level(logging.INFO)
    with local_ray(num_cpus=2) as address:
        assert os.environ["RAY_ADDRESS"] == address
        port = int(address.rpartition(":")[2])
        for name in ("one", "two"):
            config = MarkerConfig(folder=str(tmp_path), use_ray=True)
            run_step("marker_step", config, name=name, backend="local", context=context)
    assert caplog.text.count("ray says 42") == 2
    assert "RAY_ADDRESS" not in os.environ
    assert free_port(port) == port


@pytest.mark.ray
def test_a_job_runs_and_a_second_submission_attaches_to_it(tmp_path, context, jobs_settings, caplog):
    from pipelines.ray_jobs import find_jobs, job_client

    caplog.set_level(logging.INFO)
    config = MarkerConfig(folder=str(tmp_path), seconds=60)
    first, first_errors = run_in_thread(config, context, "jobs")
    wait_for_file(tmp_path / "started.txt")
    second, second_errors = run_in_thread(config, context, "jobs")
    client = job_client()
    assert wait_for(lambda: caplog.text.count(f"foreframe.{context.run_key}.mark") >= 2, timeout_s=20)
    (tmp_path / "go").touch()
    first.join(60)
    second.join(60)
    assert (first_errors, second_errors) == ([], [])
    assert len(started_pids(tmp_path)) == 1, "the job ran twice"
    (job,) = find_jobs(client, context.run_key)
    assert job.submission_id == f"foreframe.{context.run_key}.mark.{config.digest()[:12]}.1"
    assert jobs_settings.token_path.read_text() not in str(job.model_dump())
    assert "working with inline m1" in caplog.text


@pytest.mark.ray
def test_a_failed_job_makes_room_for_the_next_attempt(tmp_path, context, jobs_settings):
    from pipelines.ray_jobs import find_jobs, job_client

    config = MarkerConfig(folder=str(tmp_path), exit_code=2)
    for _ in range(2):
        with pytest.raises(StepError, match="value 7 is wrong"):
            run_step("marker_step", config, name="mark", context=context)
    attempts = sorted(job.submission_id.rpartition(".")[2] for job in find_jobs(job_client(), context.run_key))
    assert attempts == ["1", "2"]


@pytest.mark.ray
def test_the_cancel_hook_called_by_keyword_stops_the_job(tmp_path, context, jobs_settings):
    from pipelines.hooks import stop_ray_job

    thread, errors = run_in_thread(MarkerConfig(folder=str(tmp_path), seconds=120), context, "jobs")
    wait_for_file(tmp_path / "started.txt")
    (pid,) = started_pids(tmp_path)
    state = SimpleNamespace(type=SimpleNamespace(value="CANCELLED"))
    stop_ray_job(flow=None, flow_run=SimpleNamespace(id=context.run_key), state=state)
    thread.join(30)
    wait_gone(pid)
    assert isinstance(errors[0], StepCrashedError)
    assert "was stopped" in str(errors[0])
    assert not (tmp_path / "done.txt").exists()


@pytest.mark.ray
def test_a_wrong_token_is_refused_at_once(tmp_path, context, jobs_settings, monkeypatch):
    from infra.errors import ConfigError
    from infra.settings import settings

    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    monkeypatch.setenv("FOREFRAME_RAY_TOKEN_PATH", str(wrong))
    settings.cache_clear()
    with pytest.raises(ConfigError, match="refuses the token"):
        run_step("marker_step", MarkerConfig(folder=str(tmp_path)), name="mark", context=context)
