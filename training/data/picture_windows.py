"""Windows of episodes with the pictures that a policy learns from end to end: history, goals, or pairs of frames.

Pictures are kept in memory at the model's size where they fit, else decoded when they are needed (by loader workers, if
there are any). What is drawn for a window follows from (seed, epoch, window).
Shape letters: B windows, V cameras, T pictures of one window, S side, c crop, K chunk, D action target, P
proprioception, G sentence width, F frames of all episodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch.utils.data import Dataset

from infra.config import Config
from infra.errors import ConfigError
from ingest.reader import ShardDataset, Split
from training.data.episodes import ActionWindows, Episode
from training.models.common.actions import ActionCodec
from training.models.common.pictures import resized
from training.state import counter_seed

log = logging.getLogger(__name__)

FRAMES_AT_ONCE = 64
Images = npt.NDArray[np.uint8]
Span = tuple[int, int]  # least and most frames between the decision and a picture, both included


class PictureDataConfig(Config):
    """Which episodes. Their pictures are kept in memory when they need at most `memory_bytes` at the model's size."""

    url: str
    split: Split | None = "train"
    cameras: tuple[str, ...] = Field(default=("main",), min_length=1)
    memory_bytes: int = Field(default=4 << 30, ge=0)


class EpisodePictures:
    """Every frame of some episodes as uint8 at one size.

    `through` is what pictures pass once before they are kept, e.g. an autoencoder; `ConfigError` where they do not fit
    in memory then.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        episodes: Sequence[Episode],
        *,
        cameras: Sequence[str],
        size: int,
        antialias: bool,
        memory_bytes: int,
        through: Callable[[Images], Images] | None = None,
    ) -> None:
        self._dataset, self._episodes = dataset, list(episodes)
        self._cameras, self._size, self._antialias = tuple(cameras), size, antialias
        self._through = through
        lengths = [episode.num_frames for episode in episodes]
        self._starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.num_frames = sum(lengths)
        self.num_bytes = self.num_frames * len(self._cameras) * size * size * 3
        self.in_memory = self.num_bytes <= memory_bytes
        self._rows_FVSSC: Images | None = None
        if through is not None and not self.in_memory:
            raise ConfigError(
                f"reconstructed pictures need {self.num_bytes} bytes of memory, data.memory_bytes is {memory_bytes}.",
                remedy="Raise data.memory_bytes, or train on real pictures.",
            )

    def load(self) -> None:
        """Decode everything once, if it is to be kept."""
        shape = (self.num_frames, len(self._cameras), self._size, self._size, 3)
        where = "kept in memory" if self.in_memory else "decoded when needed"
        if self._rows_FVSSC is not None:
            return
        log.info("%d frames of %d camera(s) at %d px: %.1f MB, %s", *shape[:3], self.num_bytes / 1e6, where)
        if not self.in_memory:
            return
        rows, done = np.empty(shape, np.uint8), 0
        for number, episode in enumerate(self._episodes):
            for start in range(0, episode.num_frames, FRAMES_AT_ONCE):
                frames = range(start, min(start + FRAMES_AT_ONCE, episode.num_frames))
                rows[done : done + len(frames)] = self._decode(number, frames)
                done += len(frames)
        self._rows_FVSSC = rows

    def get(self, places: Sequence[tuple[int, int]]) -> Images:
        """(n, V, S, S, 3) of (episode's position in the list, frame) places."""
        if self._rows_FVSSC is not None:
            return self._rows_FVSSC[[int(self._starts[episode]) + frame for episode, frame in places]]
        return np.concatenate([self._decode(episode, [frame]) for episode, frame in places])

    def _decode(self, number: int, frames: Sequence[int]) -> Images:
        index = self._episodes[number].index
        found = [
            resized(self._dataset.frames(index, frames, camera), self._size, antialias=self._antialias)
            for camera in self._cameras
        ]
        views = np.stack(found, axis=1)
        if self._through is None:
            return views
        return self._through(views.reshape(-1, *views.shape[2:])).reshape(views.shape)


@dataclass(frozen=True)
class PictureBatch:
    """B decisions. `steps` and `noise` are there for a diffusion policy only."""

    images: torch.Tensor  # (B, V, T, S, S, 3) uint8, or sides c
    states: torch.Tensor  # (B, T, P) float32 normalised, at the pictures
    targets: torch.Tensor  # (B, K, D) float32 normalised
    mask: torch.Tensor  # (B, K) bool, False behind the end of the episode
    text: torch.Tensor  # (B, G) float32; G is 0 for a policy that hears no sentence
    steps: torch.Tensor | None = None  # (B,) int64
    noise: torch.Tensor | None = None  # (B, K, D) float32 standard normal

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, start: int, stop: int) -> Self:
        """Decisions [start, stop)."""
        return replace(self, **{name: value[start:stop] for name, value in self.tensors().items()})

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is there, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class WindowPlan:
    """What is taken for a window: one picture a span, a crop of side `crop` (0: none), diffusion steps (0: none)."""

    spans: tuple[Span, ...]
    size: int
    crop: int = 0
    train_steps: int = 0


class PictureWindows(Dataset[PictureBatch]):
    """Map-style over (epoch, number) visits; `numbers` are the windows that take part.

    `pictures` has one store for each span. All pictures of a window have the same crop.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        windows: ActionWindows,
        numbers: npt.NDArray[np.int64],
        *,
        pictures: Sequence[EpisodePictures],
        plan: WindowPlan,
        codec: ActionCodec,
        text_EG: torch.Tensor,
        seed: int,
    ) -> None:
        self._episodes, self._windows, self._numbers = episodes, windows, numbers
        self._pictures, self._plan, self._codec = pictures, plan, codec
        self._text, self._seed = text_EG, seed

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitems__(self, visits: Sequence[tuple[int, int]]) -> PictureBatch:
        """The batch of these visits."""
        windows = self._windows.batch([int(self._numbers[number]) for _, number in visits])
        generators = [
            torch.Generator().manual_seed(counter_seed(self._seed, "window", epoch, number)) for epoch, number in visits
        ]
        episodes = windows.episodes.tolist()
        chosen = [
            self._frames(self._episodes[episode].num_frames, frame, generator)
            for episode, frame, generator in zip(episodes, windows.frames.tolist(), generators, strict=True)
        ]
        pictures = [
            store.get([(episode, frames[place]) for episode, frames in zip(episodes, chosen, strict=True)])
            for place, store in enumerate(self._pictures)
        ]
        images = torch.from_numpy(np.stack(pictures, axis=2))
        states = torch.stack([
            self._codec.state(torch.from_numpy(self._episodes[episode].proprioception[frames]))
            for episode, frames in zip(episodes, chosen, strict=True)
        ])  # fmt: skip
        batch = PictureBatch(
            images=self._cropped(images, generators),
            states=states,
            targets=self._codec.encode(windows.actions, windows.proprioception),
            mask=windows.mask,
            text=self._text[windows.episodes],
        )
        return self._with_diffusion(batch, generators) if self._plan.train_steps else batch

    def _frames(self, num_frames: int, frame: int, generator: torch.Generator) -> list[int]:
        drawn = [int(torch.randint(low, high + 1, (), generator=generator)) for low, high in self._plan.spans]
        return [min(max(frame + offset, 0), num_frames - 1) for offset in drawn]

    def _cropped(self, images: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        side = self._plan.crop
        if not side:
            return images
        corners = [torch.randint(self._plan.size - side + 1, (2,), generator=g).tolist() for g in generators]
        parts = [
            window[:, :, top : top + side, left : left + side]
            for window, (top, left) in zip(images, corners, strict=True)
        ]
        return torch.stack(parts)

    def _with_diffusion(self, batch: PictureBatch, generators: Sequence[torch.Generator]) -> PictureBatch:
        steps = [torch.randint(self._plan.train_steps, (), generator=generator) for generator in generators]
        noise = [torch.randn(batch.targets.shape[1:], generator=generator) for generator in generators]
        return replace(batch, steps=torch.stack(steps), noise=torch.stack(noise))
