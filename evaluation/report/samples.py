"""What a data set's records say of its samples: all of them, or as many as a page needs, spread evenly."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from evaluation.report.text import grouped
from infra.errors import ForeframeError
from infra.storage import is_remote
from ingest.reader import ShardDataset
from ingest.schema import CameraRecord

log = logging.getLogger(__name__)
Item = TypeVar("Item")

MAX_RECORDS = 2000
MAX_REMOTE_SHARDS = 8  # a remote shard is fetched whole


@dataclass(frozen=True)
class CameraFacts:
    """One camera of a sample. `seconds` is 0 where the record's rate cannot be divided by."""

    name: str
    size: str
    fps: float
    num_frames: int
    seconds: float
    motion: float | None
    brightness: float | None
    length: str


@dataclass(frozen=True)
class SampleFacts:
    """What the page counts of one sample; `index` is its place in the data set."""

    index: int
    key: str
    source_id: str
    text: str
    label: str
    split: str
    cameras: tuple[CameraFacts, ...]

    @property
    def seconds(self) -> float:
        """Length of its first camera, as ingest counts it."""
        return self.cameras[0].seconds


@dataclass(frozen=True)
class Samples:
    """The samples that were looked at, of `total`; `notes` says why it is not all of them."""

    facts: tuple[SampleFacts, ...]
    total: int
    notes: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every sample of the data set was looked at."""
        return len(self.facts) == self.total

    def cameras(self, value: Callable[[CameraFacts], float | None]) -> list[float]:
        """A number of every camera that has it."""
        found = (value(camera) for sample in self.facts for camera in sample.cameras)
        return [number for number in found if number is not None and math.isfinite(number)]


def read_samples(data: ShardDataset, *, limit: int = MAX_RECORDS) -> Samples:
    """At most `limit` samples spread over the data set; a shard that cannot be read costs its own samples only."""
    facts: list[SampleFacts] = []
    problems: dict[int, str] = {}
    for shard, index in spread(data.shard_sizes, limit, max_shards=MAX_REMOTE_SHARDS if is_remote(data.url) else None):
        if shard in problems:
            continue
        try:
            facts.append(_facts(data, index))
        except (ForeframeError, OSError, ValueError) as error:
            log.warning("report: sample %d of %s: %s", index, data.url, error)
            problems[shard] = f"Samples could not be read: {error}"
    notes = list(problems.values())
    if len(facts) < len(data) and not problems:
        notes.append(
            f"{grouped(len(facts))} of {grouped(len(data))} samples, spread evenly over the data set, were looked at; "
            "counts of samples, frames, sizes, rates, labels and splits are of all."
        )
    return Samples(tuple(facts), len(data), tuple(notes))


def spread(shard_sizes: Sequence[int], limit: int, *, max_shards: int | None = None) -> list[tuple[int, int]]:
    """(shard, sample index), ascending: at most `limit` samples at equal distances in at most `max_shards` shards."""
    starts = list(accumulate(shard_sizes, initial=0))
    filled = [shard for shard, size in enumerate(shard_sizes) if size]
    if max_shards is not None:
        filled = even(filled, max_shards)
    ends = list(accumulate(shard_sizes[shard] for shard in filled))
    places = []
    for position in even(range(ends[-1] if ends else 0), limit):
        number = bisect_right(ends, position)
        shard = filled[number]
        places.append((shard, starts[shard] + position - (ends[number] - shard_sizes[shard])))
    return places


def even(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` of the items at equal distances, the first one among them."""
    shown = min(limit, len(items))
    return [items[position * len(items) // shown] for position in range(shown)]


def _facts(data: ShardDataset, index: int) -> SampleFacts:
    record = data.record(index)
    return SampleFacts(
        index=index,
        key=record.key,
        source_id=record.source_id,
        text=data.text(index),
        label=record.label,
        split=str(record.metadata.get("split") or "train"),
        cameras=tuple(_camera(name, camera) for name, camera in record.cameras.items()),
    )


def _camera(name: str, camera: CameraRecord) -> CameraFacts:
    return CameraFacts(
        name=name,
        size=f"{camera.width}x{camera.height}",
        fps=camera.fps,
        num_frames=camera.num_frames,
        seconds=camera.num_frames / camera.fps if camera.fps > 0 else 0.0,
        motion=camera.motion,
        brightness=camera.brightness,
        length=camera.length,
    )
