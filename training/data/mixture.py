"""Which source and which of its clips stands at a position of a mixture: exact shares, no state, no search.

Positions are cut into blocks. Every block has the same slots in the same seeded order, and each source as many of
them as its probability asks for, so that the shares hold in every block and not only on average. A source's clips
come in the endless order of its own `SampleOrder`: small sources repeat, large ones are gone through once.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError
from ingest.order import SampleOrder
from training.state import counter_seed

Indices = npt.NDArray[np.int64]


class Mixture:
    """An endless sequence of (source, epoch, clip) over sources of `num_clips_per_source` clips.

    `probabilities` may have any positive scale. `slice` is what the step loader takes, as of a `SampleOrder`.
    `num_clips`, the length of one pass over the mixture, is the largest source's, as in the official code.
    """

    def __init__(
        self, probabilities: Sequence[float], *, num_clips_per_source: Sequence[int], seed: int, block: int = 100
    ) -> None:
        if not probabilities or len(probabilities) != len(num_clips_per_source):
            raise ConfigError(f"{len(probabilities)} probabilities for {len(num_clips_per_source)} sources.")
        self.counts = slot_counts(probabilities, block)
        self.num_clips = max(num_clips_per_source)
        self.seed, self.block = seed, block
        self.slots = self._shuffle()
        self._rank = np.empty(block, np.int64)  # how many slots of the same source come before, within the block
        for source, count in enumerate(self.counts):
            self._rank[self.slots == source] = np.arange(count)
        self._orders = tuple(
            SampleOrder(num_clips, counter_seed(seed, "mixture", source))
            for source, num_clips in enumerate(num_clips_per_source)
        )

    def locate(self, position: int) -> tuple[int, int]:
        """(source, index within that source's endless order) of a position, in O(1)."""
        if position < 0:
            raise ConfigError(f"position {position} is negative.", remedy="Steps and sizes start at 0.")
        block, slot = divmod(position, self.block)
        source = int(self.slots[slot])
        return source, block * self.counts[source] + int(self._rank[slot])

    def visit(self, position: int) -> tuple[int, int, int]:
        """(source, epoch of that source, clip) of a position."""
        sources, epochs, clips = self.slice(position, position + 1)
        return int(sources[0]), int(epochs[0]), int(clips[0])

    def slice(self, start: int, stop: int) -> tuple[Indices, Indices, Indices]:
        """(source, epoch, clip) of every position in [start, stop), each of shape (stop - start,)."""
        if not 0 <= start <= stop:
            raise ConfigError(f"positions [{start}, {stop}) are not a range.", remedy="Steps and sizes start at 0.")
        blocks, slots = np.divmod(np.arange(start, stop, dtype=np.int64), self.block)
        sources = self.slots[slots]
        indices = blocks * np.asarray(self.counts, np.int64)[sources] + self._rank[slots]
        epochs, clips = np.empty_like(sources), np.empty_like(sources)
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            # Neighbours of one source are neighbours in its order, so one slice of it holds them all.
            first, last = int(indices[rows[0]]), int(indices[rows[-1]])
            epochs[rows], clips[rows] = self._orders[source].slice(first, last + 1)
        return sources, epochs, clips

    def _shuffle(self) -> Indices:
        slots = np.repeat(np.arange(len(self.counts), dtype=np.int64), self.counts)
        bits = np.random.Philox(key=np.array([counter_seed(self.seed, "slots"), 0], np.uint64))
        return slots[np.argsort(np.asarray(bits.random_raw(self.block), np.uint64), kind="stable")]


def slot_counts(probabilities: Sequence[float], block: int) -> tuple[int, ...]:
    """Slots of each source in a block: the largest remainder method on the probabilities as written in decimal.

    `ConfigError` when a source would get no slot at all.
    """
    if min(probabilities) <= 0:
        raise ConfigError(f"probabilities {tuple(probabilities)} are not all positive.")
    weights = [Fraction(str(float(probability))) for probability in probabilities]
    quotas = [weight * block / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda source: (counts[source] - quotas[source], source))
    for source in by_remainder[: block - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        empty = probabilities[counts.index(0)]
        raise ConfigError(
            f"a probability of {empty} has no slot in a block of {block}.", remedy="Use a larger block or leave it out."
        )
    return tuple(counts)
