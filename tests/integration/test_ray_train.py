"""Real Ray Train fits of two workers on gloo: a killed worker, a killed driver, an error that must not be retried."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.config import Config
from infra.errors import DataError
from infra.storage import read_bytes
from tests.helpers_data import make_frames_dataset
from tests.helpers_training import small_pretrain
from training.checkpoint import list_checkpoints
from training.export import load_encoder
from training.launch import launch

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_frames_dataset(tmp_path_factory.mktemp("frames"), num_clips=6, num_frames=20, size=40)


def losses(output: object) -> list[float]:
    return [json.loads(line)["loss"] for line in read_bytes(f"{output}/metrics.jsonl").decode().splitlines()]


@pytest.fixture(scope="module")
def inline_losses(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("inline")
    launch(small_pretrain(data, output, "precision=float32", "model.free_bits=0"))
    return losses(output)


def two_workers(data: str, output: object, *assignments: str) -> Config:
    return small_pretrain(data, output, "precision=float32", "model.free_bits=0", "compute.workers=2", *assignments)


def test_a_killed_worker_is_replaced_and_a_run_on_s3_has_the_losses_of_one_process(
    moto_s3, data, inline_losses, tmp_path, monkeypatch
):
    output = f"{moto_s3}/ray-train"
    monkeypatch.setenv("FOREFRAME_FAULT", "train.step@rank=1 step=7.")
    monkeypatch.setenv("FOREFRAME_FAULT_ONCE", str(tmp_path / "killed"))
    summary = launch(two_workers(data, output))
    assert (tmp_path / "killed").exists(), "no worker was killed"
    assert summary["steps"] == 12
    assert summary["execution"]["first_step"] > 0, "it started from scratch"
    # float32 sums over two ranks differ in the last digits
    assert losses(output) == pytest.approx(inline_losses, rel=1e-4)
    assert load_encoder(f"{output}/export").embed_dim == 16


def test_a_killed_driver_continues_when_started_again(ray_cluster, data, inline_losses, tmp_path):
    config = two_workers(data, tmp_path / "run", "schedule.steps=120", "checkpoint.every_steps=20")
    config.save(tmp_path / "job.json")
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    driver = subprocess.Popen([sys.executable, "-m", "training.main", str(tmp_path / "job.json")], env=environment)
    deadline = time.monotonic() + 120
    while len(list_checkpoints(config.checkpoints_url())) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "run" / "summary.json").exists(), "it had finished before it was killed"
    summary = launch(config)
    assert summary["steps"] == 120
    assert summary["execution"]["first_step"] > 0


def test_an_error_of_one_rank_that_no_restart_can_mend_ends_the_run(tmp_path):
    # One of eight clips cannot be decoded, so at any step at most one rank meets it.
    data = Path(make_frames_dataset(tmp_path / "frames", num_clips=8, num_frames=20, size=40, clips_per_shard=1))
    tar = data / "shard-00003.tar"
    tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff", b"\x00\x00\x00"))
    with pytest.raises(DataError, match="JPEG"):
        launch(two_workers(str(data), tmp_path / "run"))
