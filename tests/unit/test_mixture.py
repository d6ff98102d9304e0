"""Shares are exact in every block, and a position is found without walking to it."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from training.data.mixture import Mixture, slot_counts


@pytest.mark.parametrize(
    ("probabilities", "block", "counts"),
    [
        ((0.4, 0.2, 0.2, 0.2), 100, (40, 20, 20, 20)),
        ((0.08, 0.08, 0.09, 0.06, 0.06, 0.06, 0.09, 0.09, 0.09, 0.09, 0.09, 0.12), 100, None),
        ((0.29, 0.71), 100, (29, 71)),
        ((1, 1, 1), 100, (34, 33, 33)),
        ((2, 1, 1), 4, (2, 1, 1)),
        ((0.05, 0.95), 10, (1, 9)),
        ((3, 3, 1), 10, (4, 4, 2)),
        ((7.5,), 3, (3,)),
    ],
)
def test_slots_by_largest_remainder(probabilities, block, counts):
    expected = counts or tuple(round(100 * probability) for probability in probabilities)
    assert slot_counts(probabilities, block) == expected
    assert sum(expected) == block


@pytest.mark.parametrize(
    ("probabilities", "num_clips", "words"),
    [
        ((0.001, 0.999), (5, 5), "0.001 has no slot in a block of 100"),
        ((0.5, 0.0), (5, 5), "not all positive"),
        ((0.5, 0.5), (5,), "2 probabilities for 1 sources"),
        ((), (), "0 probabilities"),
        ((0.5, 0.5), (5, 0), "0 clips"),
    ],
)
def test_mixtures_that_cannot_be(probabilities, num_clips, words):
    with pytest.raises(ConfigError, match=words):
        Mixture(probabilities, num_clips_per_source=num_clips, seed=1)


def test_every_block_has_the_exact_shares():
    mixture = Mixture((0.4, 0.2, 0.2, 0.2), num_clips_per_source=(7, 31, 2, 100), seed=3)
    sources, _, _ = mixture.slice(0, 5000)
    for block in sources.reshape(50, 100):
        assert Counter(block.tolist()) == {0: 40, 1: 20, 2: 20, 3: 20}
    assert sources[:40].tolist() != sorted(sources[:40]), "slots of one source are not all in a row"


mixtures = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 9), min_size=count, max_size=count),
        st.lists(st.integers(1, 12), min_size=count, max_size=count),
        st.integers(0, 2**40),
        st.sampled_from([36, 50, 101]),
    )
)


@given(mixtures)
@settings(max_examples=40)
def test_a_position_is_what_counting_up_to_it_gives(parts):
    weights, num_clips, seed, block = parts
    mixture = Mixture(weights, num_clips_per_source=num_clips, seed=seed, block=block)
    seen: Counter[int] = Counter()
    clips_of_epoch: dict[tuple[int, int], list[int]] = {}
    for position in range(3 * block + 5):
        source, index = mixture.locate(position)
        assert source == mixture.slots[position % block]
        assert index == seen[source]
        seen[source] += 1
        visited_source, epoch, clip = mixture.visit(position)
        assert (visited_source, epoch) == (source, index // num_clips[source])
        clips_of_epoch.setdefault((source, epoch), []).append(clip)
    for (source, epoch), clips in clips_of_epoch.items():
        assert len(set(clips)) == len(clips), "no clip twice in an epoch of its source"
        assert set(clips) <= set(range(num_clips[source]))
        if (source, epoch + 1) in clips_of_epoch:
            assert len(clips) == num_clips[source], "an epoch is whole before the next begins"


@given(st.integers(0, 10**7), st.integers(0, 300), st.integers(0, 2**62))
@settings(max_examples=30)
def test_a_slice_is_its_visits(start, count, seed):
    mixture = Mixture((5, 3, 1), num_clips_per_source=(4, 90, 7), seed=seed, block=30)
    columns = mixture.slice(start, start + count)
    assert [column.dtype for column in columns] == [np.dtype(np.int64)] * 3
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert rows == [mixture.visit(position) for position in range(start, start + count)]


def test_a_far_position_costs_no_more_than_a_near_one():
    mixture = Mixture((0.4, 0.6), num_clips_per_source=(1000, 70_000), seed=5)
    started = time.process_time()
    position = 10**12 + 17
    source, index = mixture.locate(position)
    before = mixture.slots[:17].tolist().count(source)
    assert index == 10**10 * (40, 60)[source] + before
    assert mixture.visit(position)[:2] == (source, index // (1000, 70_000)[source])
    assert len(mixture.slice(position, position + 48)[0]) == 48
    assert time.process_time() - started < 0.5


def test_the_largest_source_is_the_length():
    assert Mixture((1, 1, 1), num_clips_per_source=(4, 90, 7), seed=0).num_clips == 90


def test_seeds_and_sources_have_orders_of_their_own():
    same = [Mixture((1, 1), num_clips_per_source=(50, 50), seed=seed, block=10).slice(0, 100) for seed in (1, 1, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(same[0], same[1], strict=True))
    assert not np.array_equal(same[0][2], same[2][2])
    sources, _, clips = same[0]
    assert clips[sources == 0].tolist() != clips[sources == 1].tolist()


@pytest.mark.parametrize("span", [(-1, 3), (4, 3)])
def test_no_range(span):
    with pytest.raises(ConfigError, match="not a range"):
        Mixture((1,), num_clips_per_source=(5,), seed=0).slice(*span)
    with pytest.raises(ConfigError, match="negative"):
        Mixture((1,), num_clips_per_source=(5,), seed=0).locate(-1)
