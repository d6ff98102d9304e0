"""Windows of episodes as a policy is trained on them: targets, state, sentence, and features or pictures.

One window is one decision. What is drawn for it follows from (seed, epoch, window): noise levels, noise, which of
the cached noise draws of the video model. So neither ranks nor loader workers change what is learned from.
Shape letters: B windows, T, N, C of features, K chunk, D action target, P proprioception, G goal width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch.utils.data import Dataset

from infra.config import Config
from ingest.reader import ShardDataset, Split
from training.data.episodes import ActionWindows, Episode, load_episodes
from training.models.common.actions import ActionCodec
from training.state import counter_seed

Images = npt.NDArray[np.uint8]


class PolicyDataConfig(Config):
    """Which episodes, and which of their frames are decisions.

    `least` actions must be left at a decision (VPP's CALVIN loader: 21 frames); `every` n-th frame is one; `share` of
    the episodes is used, drawn by `seed` (the papers' 10 % of annotations). `features` is a feature cache; empty:
    features are computed for every batch; one of at most `memory_bytes` is held in memory by every process that trains.
    `proprioception` says whether the policy feels its own state.
    """

    url: str
    split: Split | None = "train"
    validation_split: Split | None = "validation"
    features: str = ""
    memory_bytes: int = Field(default=4 << 30, ge=0)
    least: int = Field(default=1, ge=1)
    every: int = Field(default=1, ge=1)
    share: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0)
    proprioception: bool = True


class CachedFeatures(Protocol):
    """What is needed of a feature cache."""

    num_draws: int

    def features(self, key: str, frames: Sequence[int], draw: int = 0) -> torch.Tensor:
        """(n, T, N, C) of frames of a sample."""
        ...


@dataclass(frozen=True)
class PolicyBatch:
    """B decisions. Either `features` or `images` is there, or neither for a policy without pictures."""

    targets: torch.Tensor  # (B, K, D) float32 normalised
    mask: torch.Tensor  # (B, K) bool, False behind the end of the episode
    state: torch.Tensor  # (B, P) float32 normalised
    goals: torch.Tensor  # (B, G) float32
    sigma_uniform: torch.Tensor  # (B,) float64 in [0, 1)
    noise: torch.Tensor  # (B, K, D) float32 standard normal
    features: torch.Tensor | None = None  # (B, T, N, C)
    images: torch.Tensor | None = None  # (B, V, H, W, 3) uint8, one view a camera
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, start: int, stop: int) -> Self:
        """Decisions [start, stop)."""
        changes = {f.name: getattr(self, f.name)[start:stop] for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **changes)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is a tensor, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def chosen_episodes(config: PolicyDataConfig, dataset: ShardDataset, *, camera: str | None = None) -> list[Episode]:
    """The episodes of a data set that `share` keeps: at least one, in data set order."""
    episodes = load_episodes(dataset, camera=camera)
    count = max(1, round(config.share * len(episodes)))
    drawn = np.random.default_rng([config.seed, len(episodes)]).permutation(len(episodes))[:count]
    return [episodes[number] for number in sorted(drawn.tolist())]


class PolicyWindows(Dataset[PolicyBatch]):
    """Map-style over (epoch, window) visits, as `SampleOrder.slice` and so the step loader give them."""

    def __init__(
        self,
        dataset: ShardDataset,
        episodes: Sequence[Episode],
        windows: ActionWindows,
        *,
        codec: ActionCodec,
        goals_EG: torch.Tensor,
        seed: int,
        cameras: Sequence[str] = (),
        cache: CachedFeatures | None = None,
    ) -> None:
        self._dataset, self._episodes, self._windows = dataset, episodes, windows
        self._codec, self._goals, self._seed = codec, goals_EG, seed
        self._cameras, self._cache = tuple(cameras), cache

    def __len__(self) -> int:
        return len(self._windows)

    def __getitems__(self, visits: Sequence[tuple[int, int]]) -> PolicyBatch:
        """The batch of these visits."""
        windows = self._windows.batch([window for _, window in visits])
        generators = [
            torch.Generator().manual_seed(counter_seed(self._seed, "window", epoch, window)) for epoch, window in visits
        ]
        targets = self._codec.encode(windows.actions, windows.proprioception)
        places = list(zip(windows.episodes.tolist(), windows.frames.tolist(), strict=True))
        uniform = [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
        noise = [torch.randn(targets.shape[1:], generator=generator) for generator in generators]
        batch = PolicyBatch(
            targets=targets,
            mask=windows.mask,
            state=self._codec.state(windows.proprioception),
            goals=self._goals[windows.episodes],
            sigma_uniform=torch.stack(uniform),
            noise=torch.stack(noise),
            texts=tuple(self._episodes[episode].text for episode, _ in places),
        )
        if self._cache is not None:
            draws = [int(torch.randint(self._cache.num_draws, (), generator=generator)) for generator in generators]
            return replace(batch, features=self._cached(self._cache, places, draws))
        return replace(batch, images=self._images(places)) if self._cameras else batch

    def _cached(self, cache: CachedFeatures, places: Sequence[tuple[int, int]], draws: Sequence[int]) -> torch.Tensor:
        rows = [
            cache.features(self._episodes[episode].key, [frame], draw)[0]
            for (episode, frame), draw in zip(places, draws, strict=True)
        ]
        return torch.stack(rows)

    def _images(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        views = [
            np.stack([
                self._dataset.frames(self._episodes[episode].index, [frame], camera)[0] for camera in self._cameras
            ])
            for episode, frame in places
        ]  # fmt: skip
        return torch.from_numpy(np.stack(views))
