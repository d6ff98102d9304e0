"""Goal T2: a run killed at any point and started again ends with the same bits as one that was left alone."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from infra.digests import sha256_file
from tests.helpers_data import make_frames_dataset
from tests.helpers_training import small_pretrain
from training.checkpoint import CHECKSUMS, newest_valid

TIMINGS = {"step_s", "wait_s"}
# Two clean kills between steps, then every place where a checkpoint or the export is half done.
FAULTS = (
    "train.step:2",
    "checkpoint.before:1",
    "checkpoint.publish:1",
    "checkpoint.after:1",
    "train.step:5",
    "checkpoint.publish:2",
    "checkpoint.after:1",
    "export.before:1",
    "export.after:1",
)


def launch_in_child(value: dict, fault: str) -> None:
    os.environ["FOREFRAME_FAULT"] = fault
    import torch

    from training.launch import launch
    from training.main import parse_config

    torch.set_num_threads(1)
    launch(parse_config(value))


def run_once(config, fault: str = "") -> int | None:
    """Exit code of the run in a process of its own; negative: the signal that ended it."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once, each child is a clean copy
    context.set_forkserver_preload(["training.launch", "training.recipes.rsp", "torch._dynamo"])
    child = context.Process(target=launch_in_child, args=(config.to_json(), fault))
    child.start()
    child.join(120)
    return child.exitcode


def fingerprint(config, output: Path) -> dict[str, object]:
    """Everything a run leaves, down to the bit, but for times and addresses."""
    last = Path(newest_valid(config.checkpoints_url()))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    return {
        "checkpoint": {path.name: sha256_file(path) for path in sorted(last.iterdir()) if path.name != CHECKSUMS},
        "losses": [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines],
        "summary": {key: summary[key] for key in ("steps", "first", "last", "data_digest", "export")},
        "export": sha256_file(output / "export" / "model.safetensors"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_frames_dataset(tmp_path_factory.mktemp("frames"), num_clips=6, num_frames=20, size=40)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    config = small_pretrain(data, output)
    assert run_once(config) == 0
    return fingerprint(config, output)


def test_a_run_killed_at_every_fault_point_in_turn_ends_with_the_same_bits(data, undisturbed, tmp_path):
    config = small_pretrain(data, tmp_path)
    for fault in FAULTS:
        assert run_once(config, fault) == -signal.SIGKILL, f"{fault} was not reached"
    assert run_once(config) == 0
    found = fingerprint(config, tmp_path)
    assert found["checkpoint"].keys() == {
        "average.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    assert found == undisturbed


@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_a_run_killed_at_one_step_ends_with_the_same_bits(data, undisturbed, tmp_path, step):
    config = small_pretrain(data, tmp_path)
    assert run_once(config, f"train.step:{step}") == -signal.SIGKILL
    assert run_once(config) == 0
    assert fingerprint(config, tmp_path) == undisturbed


def test_other_settings_of_the_machine_do_not_change_the_bits(data, undisturbed, tmp_path):
    config = small_pretrain(data, tmp_path, "compute.loader_workers=1", "checkpoint.every_steps=5", "checkpoint.keep=1")
    assert run_once(config) == 0
    assert fingerprint(config, tmp_path) == undisturbed
