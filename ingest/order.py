"""In which order clips are visited: a pure function of (seed, position), the same for any number of ranks and workers.

Positions count clips in the endless concatenation of one permutation per epoch. A global batch is a contiguous slice
of it, so a batch may span two epochs and nothing is padded or dropped; a rank's batch is a contiguous slice of the
global batch. Resuming at a step costs one permutation, whatever the step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError

Indices = npt.NDArray[np.int64]
CACHED_EPOCHS = 2  # a batch may span two; more only when it is larger than the data set
_CLIPS, _SHARDS = 1, 2  # separate streams of one seed


class SampleOrder:
    """The order of `num_clips` clips under `seed`.

    `shard_sizes` (clips per shard, in data set order) with `window` shuffles in two levels for data larger than the
    node's cache: shards in seeded order, then all clips of each run of `window` shards together. Every epoch visits
    every clip exactly once either way.
    """

    def __init__(
        self, num_clips: int, seed: int, shard_sizes: Sequence[int] | None = None, window: int | None = None
    ) -> None:
        if num_clips < 1:
            raise ConfigError(f"an order over {num_clips} clips has no first clip.", remedy="Is the data set empty?")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed = {seed} is not in [0, 2**63).")
        if window is not None and (window < 1 or shard_sizes is None):
            raise ConfigError(f"window = {window} needs shard sizes and at least one shard.")
        if shard_sizes is not None and (sum(shard_sizes) != num_clips or min(shard_sizes, default=0) < 0):
            raise ConfigError(f"shard sizes sum to {sum(shard_sizes)}, the data set has {num_clips} clips.")
        self.num_clips = num_clips
        self.seed = seed
        self.window = window
        self.shard_sizes = None if shard_sizes is None else tuple(shard_sizes)
        self._epochs: OrderedDict[int, Indices] = OrderedDict()

    def global_batch(self, step: int, global_batch_size: int) -> Indices:
        """(global_batch_size,) clip indices of training step `step` (0-based)."""
        return self.slice(step * global_batch_size, (step + 1) * global_batch_size)[1]

    def rank_batch(self, step: int, global_batch_size: int, rank: int, world_size: int) -> Indices:
        """(global_batch_size / world_size,) clip indices of one rank."""
        return self.slice(*rank_span(step, global_batch_size, rank, world_size))[1]

    def slice(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """(epoch, clip index) of every position in [start, stop), each of shape (stop - start,)."""
        if not 0 <= start <= stop:
            raise ConfigError(f"positions [{start}, {stop}) are not a range.", remedy="Steps and sizes start at 0.")
        epochs, clips = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.num_clips)
            part = self._epoch(epoch)[offset : offset + stop - start]
            epochs.append(np.full(len(part), epoch, np.int64))
            clips.append(part)
            start += len(part)
        return np.concatenate(epochs), np.concatenate(clips)

    def _epoch(self, epoch: int) -> Indices:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._permute(epoch)
            while len(self._epochs) > CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _permute(self, epoch: int) -> Indices:
        keys = _words(self.num_clips, self.seed, _CLIPS, epoch)
        if self.window is None or self.shard_sizes is None:
            return np.argsort(keys, kind="stable").astype(np.int64)
        sizes = np.asarray(self.shard_sizes, np.int64)
        shards = np.argsort(_words(len(sizes), self.seed, _SHARDS, epoch), kind="stable")
        window_of_shard = np.empty(len(sizes), np.int64)
        window_of_shard[shards] = np.arange(len(sizes)) // self.window
        return np.lexsort((keys, np.repeat(window_of_shard, sizes))).astype(np.int64)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": OrderedDict()}


def rank_span(step: int, global_batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Positions [start, stop) of one rank at one step; the global batch must divide by the world size."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size} does not exist.")
    if global_batch_size < 1 or global_batch_size % world_size:
        raise ConfigError(
            f"global batch size {global_batch_size} does not divide by {world_size} ranks.",
            remedy="Unequal ranks would weigh their clips unequally; change one of the two.",
        )
    share = global_batch_size // world_size
    start = step * global_batch_size + rank * share
    return start, start + share


def _words(count: int, seed: int, stream: int, epoch: int) -> npt.NDArray[np.uint64]:
    """Raw generator words: numpy promises these for ever, the output of `Generator.permutation` it does not."""
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=np.array([0, 0, 0, epoch], np.uint64))
    return np.asarray(bits.random_raw(count), np.uint64)
