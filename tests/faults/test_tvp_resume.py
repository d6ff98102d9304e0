"""Goal T2 for video models, from pixels and from a cache: a run killed and started again ends with the same bits."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from infra.digests import sha256_file
from tests.helpers_finetune import make_parts, small_finetune, small_fit
from training.checkpoint import CHECKSUMS, newest_valid

TIMINGS = {"step_s", "wait_s"}
PRELOADED = [
    "training.launch",
    "training.recipes.tvp_task",
    "training.recipes.vae",
    "torch._dynamo",
    "diffusers.models.autoencoders.autoencoder_kl_temporal_decoder",
    "diffusers.models.unets.unet_spatio_temporal_condition",
    "transformers.models.bert.modeling_bert",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
]
FAULTS = {"pixels": ("train.step:4",), "cache": ("checkpoint.publish:1", "export.before:1")}


def launch_in_child(value: dict, fault: str) -> None:
    os.environ["FOREFRAME_FAULT"] = fault
    import torch

    from training.launch import launch
    from training.main import parse_config

    torch.set_num_threads(1)
    launch(parse_config(value))


def run_once(config, fault: str = "") -> int | None:
    """Exit code of the run in a process of its own; negative: the signal that ended it."""
    context = multiprocessing.get_context("forkserver")  # the libraries are imported once, each child is a clean copy
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=launch_in_child, args=(config.to_json(), fault))
    child.start()
    child.join(180)
    return child.exitcode


def fingerprint(config, output: Path) -> dict[str, object]:
    """Everything a run leaves, down to the bit, but for times and addresses."""
    last = Path(newest_valid(config.checkpoints_url()))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    return {
        "checkpoint": {path.name: sha256_file(path) for path in sorted(last.iterdir()) if path.name != CHECKSUMS},
        "losses": [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines],
        "summary": {key: value for key, value in summary.items() if key not in ("output", "execution")},
        "export": sha256_file(output / "export" / "model.safetensors"),
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("source", ["pixels", "cache"])
def test_a_run_killed_at_fault_points_in_turn_ends_with_the_same_bits(parts, tmp_path, source):
    def config_at(name, *changes):
        return small_finetune(parts, tmp_path / name, *changes, cached=source == "cache")

    undisturbed = config_at("undisturbed")
    assert run_once(undisturbed) == 0
    expected = fingerprint(undisturbed, tmp_path / "undisturbed")
    assert [line["step"] for line in expected["losses"] if "validation_loss" in line] == [1, 3, 6]

    killed = config_at("killed", "compute.loader_workers=1")  # must not matter either
    for fault in FAULTS[source]:
        assert run_once(killed, fault) == -signal.SIGKILL, f"{fault} was not reached"
    assert run_once(killed) == 0
    assert fingerprint(killed, tmp_path / "killed") == expected


def test_an_autoencoder_run_killed_halfway_ends_with_the_same_bits(parts, tmp_path):
    undisturbed, killed = (small_fit(parts, tmp_path / name) for name in ("undisturbed", "killed"))
    assert run_once(undisturbed) == 0
    assert run_once(killed, "train.step:4") == -signal.SIGKILL
    assert run_once(killed) == 0
    assert fingerprint(killed, tmp_path / "killed") == fingerprint(undisturbed, tmp_path / "undisturbed")
