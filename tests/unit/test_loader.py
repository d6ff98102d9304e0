"""Batches are the same bytes for any number of workers and ranks, and after a stop at any step."""

from __future__ import annotations

import hashlib

import pytest
import torch

from infra.errors import ConfigError
from ingest.order import SampleOrder
from tests.helpers_data import make_frames_dataset
from training.data.frame_pairs import FramePairConfig, FramePairDataset
from training.data.loader import step_loader

STEPS = 6
GLOBAL_BATCH = 4  # of 6 clips: batches span epochs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> FramePairDataset:
    url = make_frames_dataset(tmp_path_factory.mktemp("loader") / "d", num_clips=6, num_frames=55, size=32)
    return FramePairDataset(FramePairConfig(url=url, image_size=24, seed=9))


def digests(dataset: FramePairDataset, *, world_size: int = 1, num_workers: int = 0, start_step: int = 0) -> list[str]:
    """One hash per step over the global batch, all ranks put together in rank order."""
    loaders = [
        step_loader(
            dataset,
            SampleOrder(len(dataset), seed=9),
            global_batch_size=GLOBAL_BATCH,
            start_step=start_step,
            stop_step=STEPS,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        for rank in range(world_size)
    ]
    found = []
    for ranks in zip(*loaders, strict=True):
        parts = [(batch.images, batch.source_frames, batch.visits) for batch in ranks]
        whole = [torch.cat(tensors).contiguous().numpy().tobytes() for tensors in zip(*parts, strict=True)]
        found.append(hashlib.sha256(b"".join(whole)).hexdigest())
    return found


@pytest.fixture(scope="module")
def undisturbed(dataset) -> list[str]:
    found = digests(dataset)
    assert len(set(found)) == STEPS
    return found


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 2), (2, 0), (4, 0), (2, 2)])
def test_ranks_and_workers_change_nothing(dataset, undisturbed, world_size, num_workers):
    assert digests(dataset, world_size=world_size, num_workers=num_workers) == undisturbed


@pytest.mark.parametrize("start_step", range(1, STEPS + 1))
def test_a_resumed_run_goes_on_with_the_same_batches(dataset, undisturbed, start_step):
    assert digests(dataset, world_size=2, start_step=start_step) == undisturbed[start_step:]


def test_an_endless_loader_goes_on_past_the_epoch(dataset):
    loader = step_loader(dataset, SampleOrder(6, seed=9), global_batch_size=4, start_step=10**9, num_workers=1)
    assert len(next(iter(loader))) == 4


def test_ranks_that_do_not_divide_are_refused_at_once(dataset):
    with pytest.raises(ConfigError, match="divide"):
        step_loader(dataset, SampleOrder(6, seed=9), global_batch_size=4, stop_step=1, rank=0, world_size=3)
