"""Video clips with their sentences, from pixels or from a latent cache, mixed over several sources.

Shape letters: B clips, T frames, S image side, h and w latent height and width, L tokens, D width of a text state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch.utils.data import Dataset, get_worker_info

from infra.config import Config
from infra.digests import sha256_json
from ingest.reader import ShardDataset
from ingest.windows import ClipSource, ClipWindows
from training.data.loader import step_loader
from training.data.mixture import Mixture
from training.data.rng import ClipRandom
from training.loop import Group

Visit = tuple[int, int, int]  # (source, epoch of that source, clip): with the seed, all that a sample depends on


class VideoDataConfig(Config):
    """Which clips are seen and at what size. `seed` 0 follows the run's seed."""

    sources: tuple[ClipSource, ...] = Field(min_length=1)
    image_size: int = Field(default=256, ge=8)
    block: int = Field(default=100, ge=1, description="positions within which the sources' shares are exact")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_clip_length(self) -> Self:
        lengths = sorted({source.rule.num_frames for source in self.sources})
        if len(lengths) > 1:
            raise ValueError(f"sources differ in frames a clip: {lengths}")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources share a name: {names}")
        return self

    @property
    def num_frames(self) -> int:
        """Frames of every clip."""
        return self.sources[0].rule.num_frames


class ClipVisit(NamedTuple):
    """One clip as it was seen: `epoch` counts passes over its own source."""

    source: int
    epoch: int
    clip: int
    camera: str


@dataclass(frozen=True)
class ClipBatch:
    """B clips. Either `pixels` or `moments` is given; the length counts clips."""

    visits: tuple[ClipVisit, ...]
    texts: tuple[str, ...]
    coefficients: torch.Tensor  # (B,) float32, weight of each clip's loss
    pixels: torch.Tensor | None = None  # (B, T, 3, S, S) uint8, or float32 0..255 when one of the clips was resized
    moments: torch.Tensor | None = None  # (B, T, 2, 4, h, w) float32 mean and deviation, unscaled
    text_states: torch.Tensor | None = None  # (B, L, D) float32

    def __len__(self) -> int:
        return len(self.visits)

    def part(self, start: int, stop: int) -> ClipBatch:
        """Clips [start, stop)."""
        return ClipBatch(
            self.visits[start:stop],
            self.texts[start:stop],
            self.coefficients[start:stop],
            *(None if tensor is None else tensor[start:stop] for tensor in self._optional),
        )

    def pin_memory(self) -> ClipBatch:
        """Called by the loader: page-locked memory for asynchronous copies to a GPU."""
        optional = (None if tensor is None else tensor.pin_memory() for tensor in self._optional)
        return ClipBatch(self.visits, self.texts, self.coefficients.pin_memory(), *optional)

    @property
    def _optional(self) -> tuple[torch.Tensor | None, ...]:
        return self.pixels, self.moments, self.text_states


class VideoClipDataset(Dataset[ClipBatch]):
    """Map-style over (source, epoch, clip) visits, as `Mixture.slice` and so the step loader give them.

    `windows[source]` lists a source's clips, `mixture` orders them. With `ClipSource.latents` set on all sources
    batches come from latent caches, with it on none from pixels; on some of them is a `ConfigError`.
    """

    def __init__(self, config: VideoDataConfig) -> None:
        self.config = config
        opened: dict[tuple[str, str | None], ShardDataset] = {}
        for source in config.sources:
            key = (source.url, source.split)
            opened[key] = opened.get(key) or ShardDataset(source.url, split=source.split)
        self.windows = tuple(ClipWindows(source, opened[source.url, source.split]) for source in config.sources)
        self.mixture = Mixture(
            [source.probability for source in config.sources],
            num_clips_per_source=[len(windows) for windows in self.windows],
            seed=config.seed,
            block=config.block,
        )
        self.num_clips = self.mixture.num_clips
        self.inputs: tuple[str, ...] = tuple(dict.fromkeys(windows.dataset.version for windows in self.windows))
        self.data_digest = self.inputs[0] if len(self.inputs) == 1 else sha256_json(list(self.inputs))

    def __len__(self) -> int:
        return sum(len(windows) for windows in self.windows)

    def __getitem__(self, visit: Visit) -> ClipBatch:
        return self.__getitems__([visit])

    def __getitems__(self, visits: Sequence[Visit]) -> ClipBatch:
        """The batch of these (source, epoch, clip) visits."""
        seen = tuple(self.visit(*visit) for visit in visits)
        clips = [self._pixels(visit) for visit in seen]
        if any(clip.is_floating_point() for clip in clips):
            clips = [clip.float() for clip in clips]
        return ClipBatch(
            visits=seen,
            texts=tuple(self.text(visit) for visit in seen),
            coefficients=torch.tensor([self.config.sources[visit.source].loss_coefficient for visit in seen]),
            pixels=_stack(clips),
        )

    def visit(self, source: int, epoch: int, clip: int) -> ClipVisit:
        """The visit with its camera, drawn by the source's shares from (seed, source, epoch, clip) alone."""
        shares = self.config.sources[source].cameras
        if not shares:
            return ClipVisit(source, epoch, clip, self.windows[source].camera(clip))
        drawn = ClipRandom(self.config.seed, epoch=epoch, clip=clip, draw=source).uniform(0.0, sum(shares.values()))
        cameras = list(shares)
        chosen = int(np.searchsorted(np.cumsum(list(shares.values())), drawn, side="right"))
        return ClipVisit(source, epoch, clip, cameras[min(chosen, len(cameras) - 1)])

    def text(self, visit: ClipVisit) -> str:
        """The clip's sentence."""
        return self.windows[visit.source].text(visit.clip)

    def batches(
        self,
        *,
        steps: range,
        global_batch_size: int,
        micro_batch_size: int,
        group: Group,
        loader_workers: int = 0,
    ) -> Iterator[Sequence[ClipBatch]]:
        """This rank's micro-batches of every step."""
        loader = step_loader(
            self,
            self.mixture,
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

    def _pixels(self, visit: ClipVisit) -> torch.Tensor:
        frames = self.windows[visit.source].frames(visit.clip, visit.camera)
        return resize_clip(frames, self.config.image_size)


def resize_clip(frames_THWC: npt.NDArray[np.uint8], size: int) -> torch.Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, size, size): as it is when it has that size, else float32 0..255, never rounded.

    The official resize: bilinear, without antialiasing, `align_corners` False, the picture squashed to a square.
    """
    images = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2).contiguous()
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=False)


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """0..255 of either type -> float32 in [-1, 1], on the device the pixels are on."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def _stack(clips: Sequence[torch.Tensor]) -> torch.Tensor:
    batch = torch.empty((len(clips), *clips[0].shape), dtype=clips[0].dtype)
    if get_worker_info() is not None:
        batch.share_memory_()  # filled where the parent will read it: no copy on the way
    return torch.stack(list(clips), out=batch)
