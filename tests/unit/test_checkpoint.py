"""What resume accepts, what it skips, and what it refuses."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from infra.errors import CheckpointError
from training.checkpoint import (
    CHECKSUMS,
    folder_name,
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    prune_checkpoints,
    publish_checkpoint,
    write_checkpoint,
)
from training.optim import OptimConfig, WeightAverage, build_optimizer, set_lr
from training.state import Identity, TrainState, counter_seed


def make_state(seed: int = 0, *, config: str = "c", width: int = 3) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(model, OptimConfig())
    return TrainState(model, optimizer, Identity(config, "d", 0), average=WeightAverage(model, 0.9))


def update(state: TrainState) -> None:
    torch.manual_seed(counter_seed(1, state.step))
    state.model(torch.randn(8, 3)).square().mean().backward()
    set_lr(state.optimizer, 1e-2)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.average.update(state.model)
    state.advance({"loss": float(torch.rand(()))})


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """Checkpoints of steps 1, 2 and 3."""
    state, url = make_state(), str(tmp_path / "checkpoints")
    for _ in range(3):
        update(state)
        folder = tmp_path / "local" / folder_name(state.step)
        write_checkpoint(folder, state)
        publish_checkpoint(folder, f"{url}/{folder_name(state.step)}")
    return url


def test_a_resumed_run_continues_to_the_same_bits(saved):
    undisturbed = make_state()
    for _ in range(5):
        update(undisturbed)
    resumed = make_state(seed=99)
    load_checkpoint(newest_valid(saved), resumed)
    assert resumed.step == 3
    for _ in range(2):
        update(resumed)
    for name, tensors in undisturbed.tensors().items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, resumed.tensors()[name][key]), f"{name}/{key}"
    assert resumed.record() == undisturbed.record()


@pytest.mark.parametrize("damage", ["torn file", "missing file", "no checksums", "empty checksums", "foreign file"])
def test_damaged_checkpoints_are_skipped_and_named(saved, damage, caplog):
    folder = Path(saved) / folder_name(3)
    weights = folder / "model.safetensors"
    match damage:
        case "torn file":
            weights.write_bytes(weights.read_bytes()[:-7])
        case "missing file":
            weights.unlink()
        case "no checksums":
            (folder / CHECKSUMS).unlink()
        case "empty checksums":
            (folder / CHECKSUMS).write_text("")
        case "foreign file":
            weights.write_bytes(b"\x80\x04\x95 pickled")
    with caplog.at_level(logging.WARNING):
        assert newest_valid(saved) == f"{saved}/{folder_name(2)}"
    assert "skipping" in caplog.text and folder_name(3) in caplog.text


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert newest_valid(str(tmp_path / "nothing")) is None


@pytest.mark.parametrize(("other", "word"), [({"config": "x"}, "config_digest"), ({"width": 5}, "does not fit")])
def test_a_checkpoint_of_another_run_or_model_is_refused(saved, other, word):
    with pytest.raises(CheckpointError, match=word):
        load_checkpoint(newest_valid(saved), make_state(**other))


def test_pruning_keeps_the_newest(saved):
    prune_checkpoints(saved, keep=2)
    assert list_checkpoints(saved) == [folder_name(3), folder_name(2)]
