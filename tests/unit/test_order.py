"""The visiting order: every epoch a permutation, every batch a slice, nothing depends on the number of ranks."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from ingest.order import SampleOrder

SEEDS = st.integers(0, 2**40)
SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(st.integers(1, 60), SEEDS, st.integers(0, 5))
def test_each_epoch_visits_every_clip_once(num_clips, seed, epoch):
    epochs, clips = SampleOrder(num_clips, seed).slice(epoch * num_clips, (epoch + 1) * num_clips)
    assert sorted(clips.tolist()) == list(range(num_clips))
    assert set(epochs.tolist()) == {epoch}


@given(SHARDS, SEEDS, st.integers(1, 12), st.integers(0, 3))
def test_windows_keep_shards_together_and_still_visit_every_clip_once(sizes, seed, window, epoch):
    num_clips = sum(sizes)
    order = SampleOrder(num_clips, seed, shard_sizes=sizes, window=window)
    _, clips = order.slice(epoch * num_clips, (epoch + 1) * num_clips)
    assert sorted(clips.tolist()) == list(range(num_clips))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[clips]
    first, last = {}, {}
    for position, shard in enumerate(shard_of.tolist()):
        first.setdefault(shard, position)
        last[shard] = position
    for position in range(num_clips):  # what a cache of `window` shards needs
        assert sum(first[shard] <= position <= last[shard] for shard in first) <= window


@given(st.integers(1, 40), SEEDS, st.integers(0, 30), st.sampled_from([1, 2, 4]), st.integers(1, 6))
def test_rank_batches_put_together_are_the_global_batch(num_clips, seed, step, world_size, share):
    size = share * world_size
    order = SampleOrder(num_clips, seed)
    ranks = [SampleOrder(num_clips, seed).rank_batch(step, size, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(ranks).tolist() == order.global_batch(step, size).tolist()


@given(st.integers(1, 25), SEEDS, st.integers(1, 40), st.integers(1, 8))
def test_batches_are_consecutive_slices_of_the_endless_order(num_clips, seed, size, steps):
    order = SampleOrder(num_clips, seed)
    epochs = [SampleOrder(num_clips, seed).slice(e * num_clips, (e + 1) * num_clips)[1] for e in range(size * steps)]
    endless = np.concatenate(epochs)[: size * steps]
    batches = [order.global_batch(step, size) for step in range(steps)]
    assert np.concatenate(batches).tolist() == endless.tolist()


def test_order_is_fixed_for_ever():
    # Literal values: a resumed run of an older version must go on in the same order.
    assert SampleOrder(8, 7).global_batch(0, 16).tolist() == [3, 1, 6, 2, 5, 4, 0, 7, 2, 0, 4, 1, 5, 3, 7, 6]
    windows = SampleOrder(8, 7, shard_sizes=[3, 2, 3], window=1)
    assert windows.global_batch(0, 16).tolist() == [1, 2, 0, 3, 4, 6, 5, 7, 4, 3, 2, 0, 1, 5, 7, 6]


def test_epochs_and_seeds_differ():
    order = SampleOrder(50, 1)
    assert order.global_batch(0, 50).tolist() != order.global_batch(1, 50).tolist()
    assert order.global_batch(0, 50).tolist() != SampleOrder(50, 2).global_batch(0, 50).tolist()


def test_order_survives_pickling():
    order = SampleOrder(20, 3)
    before = order.global_batch(4, 8).tolist()
    assert pickle.loads(pickle.dumps(order)).global_batch(4, 8).tolist() == before


@pytest.mark.parametrize(
    "call",
    [
        lambda: SampleOrder(0, 1),
        lambda: SampleOrder(4, -1),
        lambda: SampleOrder(4, 1, shard_sizes=[1, 2]),
        lambda: SampleOrder(4, 1, window=2),
        lambda: SampleOrder(4, 1).rank_batch(0, 6, 0, 4),
        lambda: SampleOrder(4, 1).rank_batch(0, 4, 2, 2),
        lambda: SampleOrder(4, 1).global_batch(-1, 4),
    ],
)
def test_what_has_no_order_is_refused(call):
    with pytest.raises(ConfigError):
        call()
