"""Single frames of clips, each under its own crop and flip: what masked autoencoding and other picture methods see.

Shape letters: B clips, R frames drawn from each clip, S image side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator
from torch.utils.data import Dataset

from infra.config import Config
from infra.errors import DataError
from ingest.order import SampleOrder
from ingest.reader import ShardDataset, Split
from training.data.frame_pairs import Visit
from training.data.loader import step_loader
from training.data.pixels import crop_resize, random_resized_crop
from training.data.rng import ClipRandom
from training.loop import Group


class FrameConfig(Config):
    """Which frames are drawn and how they are cropped; data sets of either layout. The defaults are MAE's."""

    url: str
    split: Split | None = "train"
    camera: str | None = None
    repeated_sampling: int = Field(default=1, ge=1)  # frames of one visit; a `video` clip is decoded once for them
    image_size: int = Field(default=224, ge=8)
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1 or not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_scale {self.crop_scale} or crop_ratio {self.crop_ratio} is not an ascending range")
        return self


@dataclass(frozen=True)
class FrameBatch:
    """B clips with R frames each, in the order of the visits, the frames of one clip next to one another.

    Its length counts clips. A frame's random numbers follow from its visit, not from its place in the batch.
    """

    images: torch.Tensor  # (B*R, 3, S, S) uint8
    visits: tuple[Visit, ...]  # (epoch, clip) of each of the B clips
    repeats: int

    def __len__(self) -> int:
        return len(self.visits)

    def part(self, start: int, stop: int) -> FrameBatch:
        """Clips [start, stop)."""
        rows = slice(start * self.repeats, stop * self.repeats)
        return FrameBatch(self.images[rows], self.visits[start:stop], self.repeats)

    def pin_memory(self) -> FrameBatch:
        """Called by the loader: page-locked memory for asynchronous copies to a GPU."""
        return FrameBatch(self.images.pin_memory(), self.visits, self.repeats)


class FrameDataset(Dataset[FrameBatch]):
    """Map-style: indexed by a visit or, for a whole batch at once, by a list of visits."""

    def __init__(self, config: FrameConfig, dataset: ShardDataset | None = None) -> None:
        self.config = config
        self.dataset = dataset or ShardDataset(config.url, split=config.split)
        if not len(self.dataset):
            raise DataError(f"{config.url} has no samples of split {config.split!r}.", remedy="Choose another split.")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, visit: Visit) -> FrameBatch:
        return self.__getitems__([visit])

    def __getitems__(self, visits: Sequence[Visit]) -> FrameBatch:
        """The batch of these (epoch, clip) visits."""
        images = torch.cat([self._draw(epoch, clip) for epoch, clip in visits])
        return FrameBatch(images, tuple(visits), self.config.repeated_sampling)

    def batches(
        self, *, steps: range, global_batch_size: int, micro_batch_size: int, group: Group, loader_workers: int
    ) -> Iterator[Sequence[FrameBatch]]:
        """This rank's micro-batches of every step: the same clips for any number of ranks and loader workers."""
        loader = step_loader(
            self,
            SampleOrder(len(self), self.config.seed),
            global_batch_size=global_batch_size,
            start_step=steps.start,
            stop_step=steps.stop,
            rank=group.rank,
            world_size=group.world_size,
            num_workers=loader_workers,
            pin_memory=group.device.type == "cuda",
        )
        for batch in loader:
            starts = range(0, len(batch), micro_batch_size)
            yield [batch.part(start, min(start + micro_batch_size, len(batch))) for start in starts]

    def _draw(self, epoch: int, clip: int) -> torch.Tensor:
        config = self.config
        num_frames = self.dataset.num_frames(clip, config.camera)
        if num_frames < 1:
            raise DataError(f"clip {self.dataset.key(clip)} of {config.url} has no frame.", remedy="Ingest it again.")
        streams = [
            ClipRandom(config.seed, epoch=epoch, clip=clip, draw=draw) for draw in range(config.repeated_sampling)
        ]
        chosen = [stream.integer(0, num_frames - 1) for stream in streams]
        frames = self.dataset.frames(clip, chosen, config.camera)
        height, width = frames.shape[1:3]
        drawn = []
        for draw, stream in enumerate(streams):
            box = random_resized_crop(stream, height, width, scale=config.crop_scale, ratio=config.crop_ratio)
            flip = stream.uniform() < config.flip
            drawn.append(crop_resize(frames[draw : draw + 1], box, config.image_size, flip=flip))
        return torch.cat(drawn)
