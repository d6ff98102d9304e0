"""Frame pairs for RSP: (current, future) frames of one clip under one shared crop and flip (paper section 3.1).

Shape letters: B clips, R pairs drawn from each clip, S image side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch.utils.data import Dataset, get_worker_info

from infra.config import Config
from infra.errors import DataError
from ingest.reader import ShardDataset, Split
from training.data.pixels import crop_resize, random_resized_crop
from training.data.rng import ClipRandom

Visit = tuple[int, int]  # (epoch, clip): with the seed, all that a sample depends on


class FramePairConfig(Config):
    """Which pairs are drawn and how they are cropped. The defaults are the paper's."""

    url: str
    split: Split | None = "train"
    camera: str | None = None
    gap_min: int = Field(default=4, ge=1)  # in frames of the source video, both ends included
    gap_max: int = Field(default=48, ge=1)
    repeated_sampling: int = Field(default=2, ge=1)
    image_size: int = Field(default=224, ge=8)
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.gap_min > self.gap_max:
            raise ValueError(f"gap_min {self.gap_min} exceeds gap_max {self.gap_max}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1 or not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_scale {self.crop_scale} or crop_ratio {self.crop_ratio} is not an ascending range")
        return self


@dataclass(frozen=True)
class FramePairBatch:
    """B clips with R pairs each, in the order of the visits, the pairs of one clip next to one another.

    Its length counts clips.
    """

    images: torch.Tensor  # (B*R, 2, 3, S, S) uint8, [:, 0] current, [:, 1] future; channels last in memory
    source_frames: torch.Tensor  # (B*R, 2) int64 frame numbers in the source video
    visits: torch.Tensor  # (B, 2) int64: epoch and clip

    def __len__(self) -> int:
        return len(self.visits)

    def pin_memory(self) -> FramePairBatch:
        """Called by the loader: page-locked memory for asynchronous copies to a GPU."""
        return FramePairBatch(self.images.pin_memory(), self.source_frames, self.visits)


class FramePairDataset(Dataset[FramePairBatch]):
    """Map-style: indexed by a visit or, for a whole batch at once, by a list of visits."""

    def __init__(self, config: FramePairConfig, dataset: ShardDataset | None = None) -> None:
        self.config = config
        self.dataset = dataset or ShardDataset(config.url, split=config.split)
        if not len(self.dataset):
            raise DataError(f"{config.url} has no samples of split {config.split!r}.", remedy="Choose another split.")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, visit: Visit) -> FramePairBatch:
        return self.__getitems__([visit])

    def __getitems__(self, visits: Sequence[Visit]) -> FramePairBatch:
        """The batch of these (epoch, clip) visits, written into one tensor."""
        config = self.config
        num_pairs, size = len(visits) * config.repeated_sampling, config.image_size
        images = torch.empty((num_pairs, 2, size, size, 3), dtype=torch.uint8)
        if get_worker_info() is not None:
            images.share_memory_()  # filled where the parent will read it: no copy on the way
        images_channels_first = images.permute(0, 1, 4, 2, 3)
        source_frames = torch.empty((num_pairs, 2), dtype=torch.int64)
        for position, (epoch, clip) in enumerate(visits):
            rows = slice(position * config.repeated_sampling, (position + 1) * config.repeated_sampling)
            self._fill(images_channels_first[rows], source_frames[rows], epoch, clip)
        return FramePairBatch(images_channels_first, source_frames, torch.tensor(visits, dtype=torch.int64).view(-1, 2))

    def _fill(self, images: torch.Tensor, source_frames: torch.Tensor, epoch: int, clip: int) -> None:
        config = self.config
        numbers = self.dataset.source_frames(clip, config.camera)
        if len(numbers) < 2:
            raise DataError(
                f"clip {self.dataset.key(clip)} of {config.url} has {len(numbers)} frame(s); a pair needs two.",
                remedy="Set the recipe's minimum number of frames and ingest again.",
            )
        streams = [
            ClipRandom(config.seed, epoch=epoch, clip=clip, draw=draw) for draw in range(config.repeated_sampling)
        ]
        pairs = [draw_pair(stream, numbers, gap_min=config.gap_min, gap_max=config.gap_max) for stream in streams]
        frames = self.dataset.frames(clip, [frame for pair in pairs for frame in pair], config.camera)
        height, width = frames.shape[1:3]
        for draw, (stream, pair) in enumerate(zip(streams, pairs, strict=True)):
            box = random_resized_crop(stream, height, width, scale=config.crop_scale, ratio=config.crop_ratio)
            flip = stream.uniform() < config.flip
            images[draw].copy_(crop_resize(frames[2 * draw : 2 * draw + 2], box, config.image_size, flip=flip))
            source_frames[draw] = torch.from_numpy(numbers[list(pair)])


def draw_pair(
    random: ClipRandom, source_frames: npt.NDArray[np.int64], *, gap_min: int = 4, gap_max: int = 48
) -> tuple[int, int]:
    """Stored frame indices (current, future) of one pair, current < future.

    The rule is the paper's, in frames of the source video, T of them: current ~ U{0..T-gap_max-1} and gap ~
    U{gap_min..gap_max}; where T <= gap_max, two distinct stored frames. With frames stored at a stride the drawn
    numbers snap to the nearest stored ones.
    """
    num_stored = len(source_frames)
    span = int(source_frames[-1] - source_frames[0]) + 1
    if span <= gap_max:
        return random.two_of(num_stored)
    current = random.integer(0, span - gap_max - 1)
    future = current + random.integer(gap_min, gap_max)
    if span == num_stored:
        return current, future
    first, second = (_nearest(source_frames, int(source_frames[0]) + frame) for frame in (current, future))
    if first == second:
        return (first, second + 1) if second + 1 < num_stored else (first - 1, second)
    return first, second


def _nearest(numbers: npt.NDArray[np.int64], wanted: int) -> int:
    right = min(int(np.searchsorted(numbers, wanted)), len(numbers) - 1)
    left = max(right - 1, 0)
    return left if wanted - numbers[left] <= abs(numbers[right] - wanted) else right
