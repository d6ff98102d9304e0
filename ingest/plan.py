"""The plan: which clip becomes which sample of which shard. A pure function of the inputs and the recipe.

It is written once, as `plan.json` beside the shards, and every later run of the same ingest follows it; so what was
in the source folder when the plan was made decides, and a source that changes afterwards ends in the ledger.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from infra.config import Config
from infra.digests import sha256_json
from infra.media import fit
from ingest.duplicates import drop_duplicates
from ingest.inspected import InspectedClip, VideoHeader, sample_key
from ingest.recipe import Recipe
from ingest.replay import Replay
from ingest.schema import Clip, Failure
from ingest.splits import Split, draw, draw_splits

PLAN_VERSION = 2
# Measured on natural video: JPEG q90 and H.264 crf 21 GOP 8.
BYTES_PER_PIXEL = {"frames": 0.21, "video": 0.06}
BYTES_PER_FRAME = {"frames": 1400, "video": 20}  # tar header and padding, JPEG tables


class PlannedClip(Config):
    """One sample to build: frames `first_frame` to `end_frame` (None: the last) of the clip's part of its videos."""

    key: str
    clip: Clip
    first_frame: int = 0
    end_frame: int | None = None
    split: Split = "train"
    estimated_bytes: int = 0


class PlannedShard(Config):
    """One tar: its samples in order, and the failures known before building."""

    shard: int
    clips: tuple[PlannedClip, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def estimated_bytes(self) -> int:
        """Expected size of the tar."""
        return sum(clip.estimated_bytes for clip in self.clips)


class Plan(Config):
    """`plan.json`."""

    plan_version: int = PLAN_VERSION
    plan_id: str
    name: str
    corpus: str
    recipe: dict[str, Any]
    shards: tuple[PlannedShard, ...]
    inputs: tuple[str, ...]  # sha256 of every source video, sorted
    estimated_hours: float = 0.0
    parent: str = ""  # version of the data set whose failures are replayed

    @property
    def num_clips(self) -> int:
        """Samples to build plus clips already refused."""
        return sum(len(shard.clips) + len(shard.failures) for shard in self.shards)

    def summary(self) -> dict[str, Any]:
        """What `--dry-run` shows."""
        return {
            "name": self.name,
            "plan_id": self.plan_id,
            "clips": self.num_clips,
            "refused": sum(len(shard.failures) for shard in self.shards),
            "validation_clips": sum(clip.split == "validation" for shard in self.shards for clip in shard.clips),
            "source_hours": round(self.estimated_hours, 4),
            "shards": len(self.shards),
            "estimated_bytes": sum(shard.estimated_bytes for shard in self.shards),
        }


def make_plan(
    inspected: Sequence[InspectedClip], *, corpus: str, name: str, recipe: Recipe, replay: Replay | None = None
) -> Plan:
    """Same inputs and recipe, same plan, in whatever order the inputs come. `replay` says what the parent has."""
    ordered = sorted(inspected, key=lambda item: item.clip.source_id)
    kept, failures = drop_duplicates(ordered, near_bits=recipe.near_duplicate_bits)
    splits = replay.splits if replay else draw_splits([item.clip for item in kept], recipe, corpus)
    samples = [sample for item in kept for sample in _cut(item, splits.get(item.clip.source_id, "train"), recipe)]
    if replay:
        samples = [sample for sample in samples if sample.key not in replay.built]
    parent = replay.version if replay else ""
    identity = {
        "plan_version": PLAN_VERSION,
        "corpus": corpus,
        "recipe": recipe.identity(),
        "parent": parent,
        "inputs": [item.to_json() for item in ordered],
    }
    return Plan(
        plan_id=sha256_json(identity),
        name=name,
        corpus=corpus,
        recipe=recipe.identity(),
        shards=_assign(samples, failures, recipe),
        inputs=tuple(sorted({video.sha256 for item in ordered for video in item.clip.videos if video.sha256})),
        estimated_hours=sum(_seconds(item) for item in kept) / 3600,
        parent=parent,
    )


def _cut(item: InspectedClip, split: Split, recipe: Recipe) -> list[PlannedClip]:
    """Spans of nearly equal length, none longer than the recipe allows; the last runs to the source's end."""
    clip, frames = item.clip, _part_frames(item)
    num_spans = max(1, math.ceil(frames / recipe.max_frames_per_clip))
    cuts = [frames * number // num_spans for number in range(num_spans)]
    ends: list[int | None] = [*cuts[1:], None]
    size = sum(_estimate(header, recipe) for header in item.headers)
    return [
        PlannedClip(
            key=sample_key(clip, start),
            clip=clip,
            first_frame=start,
            end_frame=stop,
            split=split,
            estimated_bytes=int(size * max(frames, 1) // num_spans),
        )
        for start, stop in zip(cuts, ends, strict=True)
    ]


def _part_frames(item: InspectedClip) -> int:
    """Frames of the clip's part of its first video; 0 when nothing is known."""
    return item.headers[0].num_frames if item.headers and item.headers[0] is not None else 0


def _estimate(header: VideoHeader | None, recipe: Recipe) -> float:
    """Bytes per source frame of one video."""
    if header is None:
        return 0.0
    width, height = fit(header.width, header.height, recipe.short_side)
    stored = width * height * BYTES_PER_PIXEL[recipe.layout] + BYTES_PER_FRAME[recipe.layout]
    return stored / recipe.frame_stride


def _assign(samples: list[PlannedClip], failures: list[Failure], recipe: Recipe) -> tuple[PlannedShard, ...]:
    """In seeded order, each sample to the shard that is lightest so far: shuffled and of equal size."""
    total = sum(sample.estimated_bytes for sample in samples)
    num_shards = max(1, min(len(samples), math.ceil(total / recipe.shard_bytes)))
    lightest = [(0, shard) for shard in range(num_shards)]
    clips: dict[int, list[PlannedClip]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: (draw(recipe.seed, "shard", sample.key), sample.key)):
        weight, shard = heapq.heappop(lightest)
        clips[shard].append(sample)
        heapq.heappush(lightest, (weight + max(sample.estimated_bytes, 1), shard))
    refused: dict[int, list[Failure]] = defaultdict(list)
    for failure in failures:
        refused[int(draw(recipe.seed, "shard", failure.key) * num_shards)].append(failure)
    return tuple(
        PlannedShard(shard=shard, clips=tuple(clips[shard]), failures=tuple(refused[shard]))
        for shard in range(num_shards)
    )


def _seconds(item: InspectedClip) -> float:
    fps = next((header.fps for header in item.headers if header is not None), 1.0)
    return _part_frames(item) / fps
