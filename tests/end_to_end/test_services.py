"""The services for real: `foreframe up`, then exactly `prefect deployment run pretrain-rsp`, then `foreframe down`.

Everything is done by the commands a user types, in a folder that is not the repository, on free ports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.processes import family, wait_for
from infra.registry import CANDIDATE, ENCODER, Registry
from infra.services import STOP_ORDER, State
from infra.tracking import Tracker
from tests.fixtures_services import is_running, wait_gone

pytestmark = [pytest.mark.prefect, pytest.mark.ray, pytest.mark.sim, pytest.mark.timeout(1500)]

BIN = Path(sys.executable).parent
SMALL = {
    "simulate": ["episodes=1", 'tasks=["drawer-open"]', "damage=false"],
    "overrides": ["schedule.steps=2", "schedule.warmup_steps=1", "global_batch_size=4", "compute.workers=1"],
    "evaluation": ['sequences.tasks=["drawer-open"]', "sequences.size=128", "sequences.max_frames=4", "num_overlays=1"],
}
ENDLESS = {**SMALL, "overrides": ["schedule.steps=1000000", "global_batch_size=4", "compute.workers=1"]}
PRIVATE = re.compile(r"^(FOREFRAME_|PREFECT_|RAY_|MLFLOW_)")


class Shell:
    """A user's shell in a folder of its own: no variable of ours is exported but where things live."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        kept = {key: value for key, value in os.environ.items() if not PRIVATE.match(key)}
        # The two that say where: a test must touch neither the user's profiles nor the checkout's runs.
        self.env = {**kept, "FOREFRAME_HOME": str(self.home), "PREFECT_HOME": str(folder / "prefect")}

    def run(self, program: str, *arguments: str, timeout_s: float = 600) -> str:
        """Standard output of a command that must succeed."""
        done = subprocess.run(
            [str(BIN / program), *arguments],
            cwd=self.elsewhere,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{program} {' '.join(arguments)}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout + done.stderr

    def state(self) -> State:
        return State.model_validate_json((self.home / "services/state.json").read_bytes())

    def logs(self) -> str:
        worker = self.home / "services/prefect-worker.log"
        return worker.read_text()[-6000:] if worker.is_file() else ""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    made = Shell(tmp_path_factory.mktemp("services"))
    try:
        made.run("foreframe", "up", "--cpus", "4")
        yield made
    finally:
        made.run("foreframe", "down")


def get(url: str, token: str = "") -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


def ray_jobs(shell: Shell) -> list[dict]:
    state = shell.state().settings
    return json.loads(get(f"{state.ray_dashboard_url}/api/jobs/", Path(state.ray_token_path).read_text()))


def test_all_services_answer_on_loopback_and_ray_asks_for_its_token(shell: Shell):
    state = shell.state()
    assert state.is_running
    assert get(f"{state.settings.prefect_api_url}/health") == b"true"
    assert get(f"{state.settings.tracking_uri}/health") == b"OK"
    assert ray_jobs(shell) == []
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(f"{state.settings.ray_dashboard_url}/api/jobs/")
    sockets = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = {member.pid for name in STOP_ORDER for member in family(state.services[name].process)}
    mine = [line for line in sockets if any(f"pid={pid}," in line for pid in ours)]
    assert mine
    outside = [line for line in mine if not re.search(r"(127\.0\.0\.1\]?|\[::1\]):\d+ ", line)]
    assert outside == []


def test_up_again_starts_nothing_new(shell: Shell):
    before = shell.state().services
    assert "http://127.0.0.1:" in shell.run("foreframe", "up")
    assert shell.state().services == before


def test_the_bare_deployment_name_runs_to_a_registered_encoder(shell: Shell):
    parameters = json.dumps(SMALL)
    output = shell.run("prefect", "deployment", "run", "pretrain-rsp", "--params", parameters, "--watch", timeout_s=900)
    assert "pretrain-rsp/pretrain-rsp" in output
    jobs = ray_jobs(shell)
    assert {job["status"] for job in jobs} == {"SUCCEEDED"}, jobs
    steps = {job["submission_id"].split(".")[2] for job in jobs}
    assert {"simulate", "ingest-frames", "pretrain-rsp", "evaluate-label-propagation"} <= steps
    tracker = Tracker(shell.state().settings.tracking_uri)
    candidate = Registry(tracker).alias(ENCODER, CANDIDATE)
    assert candidate is not None
    tags = tracker.client.get_run(candidate.run_id).data.tags
    assert tags["ray.submission_id"] in {job["submission_id"] for job in jobs}
    train_runs = json.loads(
        get(
            f"{shell.state().settings.ray_dashboard_url}/api/train/v2/runs/v1",
            Path(shell.state().settings.ray_token_path).read_text(),
        )
    )["train_runs"]
    assert [run["status"] for run in train_runs] == ["FINISHED"]
    assert "1 source videos" in shell.run("foreframe", "lineage", f"{ENCODER}@{CANDIDATE}")


def test_cancelling_a_flow_run_stops_its_ray_job(shell: Shell):
    output = shell.run("prefect", "deployment", "run", "pretrain-rsp", "--params", json.dumps(ENDLESS))
    flow_run = re.search(r"UUID: ([0-9a-f-]{36})", output)[1]

    def job() -> dict:
        found = [item for item in ray_jobs(shell) if item["submission_id"].startswith(f"foreframe.{flow_run}.pretrain")]
        return found[0] if found else {}

    assert wait_for(lambda: job().get("status") == "RUNNING", timeout_s=240, every_s=1.0), shell.logs()
    time.sleep(2)
    shell.run("prefect", "flow-run", "cancel", flow_run)
    assert wait_for(lambda: job()["status"] == "STOPPED", timeout_s=120, every_s=1.0), shell.logs()


def test_down_ends_everything_that_up_started_and_nothing_else(shell: Shell):
    state = shell.state()
    members = [member.pid for name in STOP_ORDER for member in family(state.services[name].process)]
    assert len(members) > len(STOP_ORDER)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        output = shell.run("foreframe", "down")
        assert all(name in output for name in STOP_ORDER)
        for pid in members:
            wait_gone(pid)
        assert is_running(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()
    assert not (shell.home / "services/state.json").exists()
    profiles = (shell.folder / "prefect/profiles.toml").read_text()
    assert "foreframe" not in profiles
    assert "nothing was up" in shell.run("foreframe", "down")
