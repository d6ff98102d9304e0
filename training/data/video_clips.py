"""Video clips with their sentences, from pixels or from a latent cache, mixed over several sources.

Shape letters: B clips, T frames, S image side, h and w latent height and width, L tokens, D width of a text state.
"""

from __future__ import annotations

import logging
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
from infra.errors import ConfigError, DataError
from ingest.reader import ShardDataset
from ingest.windows import ClipSource, ClipWindows
from training.cache import LatentCache
from training.data.loader import step_loader
from training.data.mixture import Mixture
from training.data.rng import ClipRandom
from training.loop import Group

log = logging.getLogger(__name__)

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
    batches come from `caches`, one for each source, and with it on none from pixels; on some of them is a
    `ConfigError`. A cache must be of its source's data set and of `image_size`, and all of one VAE and text encoder
    (`InputError`). Episodes that a cache records as failed are left out.
    """

    def __init__(self, config: VideoDataConfig) -> None:
        self.config = config
        self.caches = _open_caches(config)
        opened: dict[tuple[str, str | None], ShardDataset] = {}
        windows = []
        for number, source in enumerate(config.sources):
            key = (source.url, source.split)
            opened[key] = opened.get(key) or ShardDataset(source.url, split=source.split)
            cache = self.caches[number] if self.caches else None
            windows.append(_cached_windows(source, opened[key], cache) if cache else ClipWindows(source, opened[key]))
        self.windows = tuple(windows)
        self.mixture = Mixture(
            [source.probability for source in config.sources],
            num_clips_per_source=[len(windows) for windows in self.windows],
            seed=config.seed,
            block=config.block,
        )
        self.num_clips = self.mixture.num_clips
        versions = [windows.dataset.version for windows in self.windows] + [cache.version for cache in self.caches]
        self.inputs: tuple[str, ...] = tuple(dict.fromkeys(versions))
        self.data_digest = self.inputs[0] if len(self.inputs) == 1 else sha256_json(list(self.inputs))

    def __len__(self) -> int:
        return sum(len(windows) for windows in self.windows)

    def __getitem__(self, visit: Visit) -> ClipBatch:
        return self.__getitems__([visit])

    def __getitems__(self, visits: Sequence[Visit]) -> ClipBatch:
        """The batch of these (source, epoch, clip) visits."""
        seen = tuple(self.visit(*visit) for visit in visits)
        pixels = moments = text_states = None
        if self.caches:
            moments = _stack([self._moments(visit) for visit in seen])
            text_states = _stack([self.caches[visit.source].text_states(self._key(visit)) for visit in seen])
        else:
            clips = [self._pixels(visit) for visit in seen]
            resized = any(clip.is_floating_point() for clip in clips)
            pixels = _stack([clip.float() if resized else clip for clip in clips])
        return ClipBatch(
            visits=seen,
            texts=tuple(self.text(visit) for visit in seen),
            coefficients=torch.tensor([self.config.sources[visit.source].loss_coefficient for visit in seen]),
            pixels=pixels,
            moments=moments,
            text_states=text_states,
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

    def _moments(self, visit: ClipVisit) -> torch.Tensor:
        indices = self.windows[visit.source].frame_indices(visit.clip, visit.camera)
        return self.caches[visit.source].moments(self._key(visit), visit.camera, indices)

    def _key(self, visit: ClipVisit) -> str:
        windows = self.windows[visit.source]
        return windows.dataset.key(windows.locate(visit.clip)[0])


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


def _open_caches(config: VideoDataConfig) -> tuple[LatentCache, ...]:
    """The latent cache of every source, or none."""
    urls = [source.latents for source in config.sources]
    if not any(urls):
        return ()
    if not all(urls):
        lacking = ", ".join(source.name for source in config.sources if not source.latents)
        raise ConfigError(f"some sources have a latent cache, but not {lacking}.", remedy="Cache all of them or none.")
    opened = {url: LatentCache(url) for url in dict.fromkeys(urls)}
    caches = tuple(opened[url] for url in urls)
    for cache in caches:
        cache.require(image_size=config.image_size, vae_digest=caches[0].vae_digest, text_digest=caches[0].text_digest)
    return caches


def _cached_windows(source: ClipSource, dataset: ShardDataset, cache: LatentCache) -> ClipWindows:
    """The clips of a source that its cache holds; `DataError` when an episode is missing without a recorded failure."""
    cache.require(data_version=dataset.version)
    windows = ClipWindows(source, dataset)
    recorded = {failure.key for receipt in cache.manifest.receipts for failure in receipt.failures}
    chosen = {dataset.key(sample): windows.cameras_of(sample) for sample in windows.samples.tolist()}
    failed = {
        key
        for key in recorded & chosen.keys()
        if key not in cache or not cache.sample(key).cameras.keys() >= set(chosen[key])
    }
    if failed:
        log.warning("source %r: %d episodes are left out, their latents are missing", source.name, len(failed))
        windows = ClipWindows(source, dataset, without=failed)
    missing = [key for key in map(dataset.key, windows.samples.tolist()) if key not in cache]
    if missing:
        raise DataError(
            f"latent cache {cache.url} lacks {len(missing)} of {len(windows.samples)} episodes of source "
            f"{source.name!r}, the first is {missing[0]}.",
            remedy="Was it built of another split?",
        )
    first = int(windows.samples[0])
    for camera in windows.cameras_of(first):
        cache.num_frames(dataset.key(first), camera)  # a camera that was not cached is missed now, not hours later
    return windows
