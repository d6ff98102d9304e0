"""Action windows of robot episodes for behaviour cloning, and their frames in order for features computed once.

Shape letters: T frames of an episode, N actions (T, or T - 1 where the last frame has none), A action, P
proprioception, B windows, C chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from infra.errors import ConfigError, DataError
from ingest.reader import ShardDataset

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Episode:
    """One episode without its pixels. `index` is its sample in the data set."""

    index: int
    key: str
    source_id: str
    text: str
    task: str
    num_frames: int
    actions: Floats  # (N, A)
    proprioception: Floats  # (T, P)


def load_episodes(dataset: ShardDataset, *, camera: str | None = None) -> list[Episode]:
    """Every episode's low-dimensional part, in data set order; `DataError` where arrays are missing or disagree."""
    return [_load_episode(dataset, index, camera) for index in range(len(dataset))]


def _load_episode(dataset: ShardDataset, index: int, camera: str | None) -> Episode:
    record, arrays = dataset.record(index), dataset.arrays(index)
    missing = {"actions", "proprioception"} - set(arrays)
    if missing:
        raise DataError(f"episode {record.source_id} of {dataset.url} has no {' and no '.join(sorted(missing))}.")
    actions, proprioception = (np.asarray(arrays[name], np.float32) for name in ("actions", "proprioception"))
    num_frames = dataset.num_frames(index, camera)
    shapes = f"actions {actions.shape}, proprioception {proprioception.shape}, {num_frames} frames"
    if actions.ndim != 2 or proprioception.ndim != 2 or len(proprioception) != num_frames:
        raise DataError(f"episode {record.source_id} of {dataset.url} does not fit together: {shapes}.")
    if not 0 <= num_frames - len(actions) <= 1 or not len(actions):
        raise DataError(f"episode {record.source_id} needs T or T - 1 actions: {shapes}.")
    if not (np.isfinite(actions).all() and np.isfinite(proprioception).all()):
        raise DataError(f"episode {record.source_id} of {dataset.url} holds a value that is not finite.")
    task = str(record.metadata.get("task") or record.label or record.text)
    return Episode(index, record.key, record.source_id, dataset.text(index), task, num_frames, actions, proprioception)


def iter_frames(
    dataset: ShardDataset, episodes: Sequence[Episode], *, batch_size: int = 64, camera: str | None = None
) -> Iterator[npt.NDArray[np.uint8]]:
    """(n, H, W, 3) uint8 pieces of at most `batch_size` frames of one episode, every frame once, in order.

    Concatenated, row `ActionWindows.feature_rows` of whatever is computed from them belongs to a window.
    """
    for episode in episodes:
        for start in range(0, episode.num_frames, batch_size):
            stop = min(start + batch_size, episode.num_frames)
            yield dataset.frames(episode.index, range(start, stop), camera)


@dataclass(frozen=True)
class WindowBatch:
    """What behaviour cloning sees of B time points."""

    episodes: torch.Tensor  # (B,) int64 position in the list of episodes
    frames: torch.Tensor  # (B,) int64 frame index in the episode
    feature_rows: torch.Tensor  # (B,) int64 row among all frames of all episodes, as `iter_frames` gives them
    proprioception: torch.Tensor  # (B, P) float32
    actions: torch.Tensor  # (B, C, A) float32, after the end the last action again
    mask: torch.Tensor  # (B, C) bool, False for repeated actions

    def __len__(self) -> int:
        return len(self.frames)


class ActionWindows:
    """One window for every frame from which `least` actions are left: proprioception at t, actions t..t+chunk-1.

    VPP's CALVIN loader starts a window where at least 21 frames are left; by default one action is enough. `every`
    takes each n-th frame of an episode only.
    """

    def __init__(self, episodes: Sequence[Episode], *, chunk: int, least: int = 1, every: int = 1) -> None:
        if min(chunk, least, every) < 1:
            raise ConfigError(f"chunk = {chunk}, least = {least}, every = {every}: each is at least 1.")
        if not episodes:
            raise DataError("there are no episodes to cut windows from.", remedy="Choose another data set or split.")
        widths = {(episode.actions.shape[1], episode.proprioception.shape[1]) for episode in episodes}
        if len(widths) > 1:
            raise DataError(f"episodes differ in (action, proprioception) width: {sorted(widths)}.")
        self.chunk = chunk
        self.num_actions = np.array([len(episode.actions) for episode in episodes])
        self._frame_starts = _starts([episode.num_frames for episode in episodes])
        self._action_starts = _starts(self.num_actions)
        self._actions = torch.from_numpy(np.concatenate([episode.actions for episode in episodes]))
        self._proprioception = torch.from_numpy(np.concatenate([episode.proprioception for episode in episodes]))
        starts = [np.arange(0, max(0, count - least + 1), every) for count in self.num_actions]
        self._episode_of = np.repeat(np.arange(len(episodes)), [len(frames) for frames in starts])
        self._frame_of = np.concatenate(starts)
        if not len(self):
            longest = max(self.num_actions)
            raise DataError(
                f"no episode has {least} actions, the longest has {longest}.", remedy="Ask for fewer with least."
            )

    def __len__(self) -> int:
        return len(self._episode_of)

    def batch(self, windows: npt.NDArray[np.int64] | Sequence[int]) -> WindowBatch:
        """The windows of the given numbers, e.g. from `SampleOrder(len(self), seed)`."""
        numbers = np.asarray(windows, np.int64)
        episodes, frames = self._episode_of[numbers], self._frame_of[numbers]
        rows = self._frame_starts[episodes] + frames
        ahead = frames[:, None] + np.arange(self.chunk)
        last = self.num_actions[episodes][:, None] - 1
        steps = self._action_starts[episodes][:, None] + np.minimum(ahead, last)
        return WindowBatch(
            episodes=torch.from_numpy(episodes),
            frames=torch.from_numpy(frames),
            feature_rows=torch.from_numpy(rows),
            proprioception=self._proprioception[torch.from_numpy(rows)],
            actions=self._actions[torch.from_numpy(steps)],
            mask=torch.from_numpy(ahead <= last),
        )


def _starts(counts: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))[:-1]])
