"""Randomness of one draw of one clip in one epoch: a counter, not a state.

The numbers depend on (seed, epoch, clip, draw) alone, so they are the same for any number of ranks and loader
workers, in any order of visits, and after a resume.
"""

from __future__ import annotations

import numpy as np

from infra.errors import ConfigError

_STREAM = 3  # apart from the streams of ingest.order under the same seed
_WORDS_AT_ONCE = 32
_TO_UNIT = 2.0**-53


class ClipRandom:
    """A stream of numbers keyed by (seed, epoch, clip, draw), from raw Philox words, which numpy keeps for ever."""

    def __init__(self, seed: int, *, epoch: int, clip: int, draw: int = 0) -> None:
        if min(seed, epoch, clip, draw) < 0:
            raise ConfigError(f"random key (seed {seed}, epoch {epoch}, clip {clip}, draw {draw}) is negative.")
        key = np.array([seed, _STREAM], np.uint64)
        # The generator itself counts in the first word.
        self._bits = np.random.Philox(key=key, counter=np.array([0, draw, clip, epoch], np.uint64))
        self._words: list[int] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high)."""
        return low + (high - low) * (self._word() >> 11) * _TO_UNIT

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + min(int(self.uniform() * (high - low + 1)), high - low)

    def two_of(self, count: int) -> tuple[int, int]:
        """Two distinct integers of 0..count-1, ascending; every pair equally likely."""
        first, second = self.integer(0, count - 1), self.integer(0, count - 2)
        if second >= first:
            second += 1
        return min(first, second), max(first, second)

    def _word(self) -> int:
        if not self._words:
            self._words = self._bits.random_raw(_WORDS_AT_ONCE).tolist()[::-1]
        return self._words.pop()
