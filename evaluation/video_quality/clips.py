"""Which clips are rated, in which order, and what is read of each of them.

Shape letters: T frames, H and W as stored, S side of the model's pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from evaluation.video_quality.metrics import Clip
from infra.digests import sha256_json
from infra.errors import ConfigError
from ingest.reader import ShardDataset
from ingest.windows import ClipSource, ClipWindows

T = TypeVar("T")
HAND = "proprioception"  # its first three columns are the hand's position in metres


@dataclass(frozen=True)
class ChosenClip:
    """One clip of one source, before anything of it is read."""

    source: int
    clip: int
    item_id: str
    stratum: str
    text: str


@dataclass(frozen=True)
class LoadedClip:
    """`frames` (T, H, W, 3) as stored, `truth` (T, S, S, 3) at the model's size, `hand` (T, 3) metres or None."""

    chosen: ChosenClip
    frames: Clip
    truth: Clip
    hand: npt.NDArray[np.float64] | None


class ClipSet:
    """The clips of all sources in the order of their rating: any beginning of it covers labels and episodes evenly.

    Sources and labels take turns; within one, every episode gives its first clip before any gives a second one, which
    is the one in its middle, and so on.
    """

    def __init__(self, sources: Sequence[ClipSource], *, num_clips: int = 0) -> None:
        self.sources = tuple(sources)
        opened: dict[tuple[str, str | None], ShardDataset] = {}
        self.windows = []
        for source in sources:
            place = (source.url, source.split)
            windows = ClipWindows(source, opened.get(place))
            opened[place] = windows.dataset
            self.windows.append(windows)
        groups: dict[tuple[int, str], list[list[int]]] = {}
        for number, windows in enumerate(self.windows):
            for episode in _episodes(windows):
                groups.setdefault((number, windows.label(episode[0])), []).append(_spread(episode))
        turns = [[(source, clip) for clip in _in_turns(episodes)] for (source, _), episodes in sorted(groups.items())]
        order = list(_in_turns(turns))[: num_clips or None]
        self.chosen = tuple(self._describe(source, clip) for source, clip in order)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def digest(self) -> str:
        """sha256 of what is rated: data set versions, frame rules, cameras and the clips themselves."""
        return sha256_json({"sources": self.describe_sources(), "items": [chosen.item_id for chosen in self.chosen]})

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions of the data sets, sorted."""
        return tuple(sorted({windows.dataset.version for windows in self.windows}))

    def describe_sources(self) -> list[dict[str, object]]:
        """What decides the clips of every source; an address does not."""
        return [
            {"name": source.name, "version": windows.dataset.version, "rule": source.rule.to_json()}
            | {"labels": list(source.labels), "split": source.split, "camera": next(iter(source.cameras), None)}
            for source, windows in zip(self.sources, self.windows, strict=True)
        ]

    def require_frames(self, num_frames: int) -> None:
        """`ConfigError` unless every source cuts clips of the model's length."""
        for source in self.sources:
            if source.rule.num_frames != num_frames:
                raise ConfigError(
                    f"source {source.name!r} cuts clips of {source.rule.num_frames} frames, the model predicts "
                    f"{num_frames}.",
                    remedy=f"Set rule.num_frames={num_frames}.",
                )

    def load(self, chosen: ChosenClip, *, size: int) -> LoadedClip:
        """Read one clip."""
        windows = self.windows[chosen.source]
        frames = windows.frames(chosen.clip)
        return LoadedClip(chosen, frames, resize(frames, size), self.hand(chosen))

    def hand(self, chosen: ChosenClip) -> npt.NDArray[np.float64] | None:
        """(T, 3) true hand positions in metres; None where the sample records none."""
        rows = self.windows[chosen.source].arrays(chosen.clip).get(HAND)
        if rows is None or rows.ndim != 2 or rows.shape[1] < 3:
            return None
        return np.asarray(rows[:, :3], np.float64)

    def _describe(self, source: int, clip: int) -> ChosenClip:
        windows, name = self.windows[source], self.sources[source].name
        stratum = windows.label(clip) or name
        return ChosenClip(source, clip, f"{name}/{windows.key(clip)}", stratum, windows.text(clip))


def batches(clips: Sequence[LoadedClip], batch_size: int) -> Iterator[list[LoadedClip]]:
    """Runs of at most `batch_size` clips of one stored size."""
    batch: list[LoadedClip] = []
    for clip in clips:
        if batch and (len(batch) == batch_size or clip.frames.shape != batch[0].frames.shape):
            yield batch
            batch = []
        batch.append(clip)
    if batch:
        yield batch


def resize(frames: Clip, size: int) -> Clip:
    """(T, H, W, 3) uint8 -> (T, S, S, 3) uint8: bilinear without antialias, squashed, as the model is trained."""
    if frames.shape[1:3] == (size, size):
        return frames
    pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    small = F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)
    return np.ascontiguousarray(small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


def _episodes(windows: ClipWindows) -> list[list[int]]:
    """Clips of each episode, in data set order."""
    found: dict[int, list[int]] = {}
    for clip in range(len(windows)):
        found.setdefault(windows.locate(clip)[0], []).append(clip)
    return list(found.values())


def _spread(clips: list[int]) -> list[int]:
    """First, middle, quarters ...: the numbers with their bits reversed, in ascending order."""
    bits = max(1, (len(clips) - 1).bit_length())
    order = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return [clips[index] for index in order if index < len(clips)]


def _in_turns(lists: Sequence[Sequence[T]]) -> Iterator[T]:
    """One of each list, then the next of each."""
    nothing = object()
    return (item for item in chain.from_iterable(zip_longest(*lists, fillvalue=nothing)) if item is not nothing)  # type: ignore[misc]
