"""The plan: which clip becomes which sample of which shard. A pure function of the inputs and the recipe.

It is written once, as `plan.json` beside the shards, and every later run of the same ingest follows it; so what was
in the source folder when the plan was made decides, and a source that changes afterwards ends in the ledger.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from infra.config import Config
from infra.digests import sha256_json
from infra.media import fit
from ingest.recipe import Recipe
from ingest.schema import Clip, Failure

PLAN_NAME = "plan.json"
PLAN_VERSION = 1
# Measured on natural video: JPEG q90 and H.264 crf 21 GOP 8.
BYTES_PER_PIXEL = {"frames": 0.21, "video": 0.06}
BYTES_PER_FRAME = {"frames": 1400, "video": 20}  # tar header and padding, JPEG tables
Split = Literal["train", "validation"]


class VideoHeader(Config):
    """What planning knows of a source video; `num_frames` is declared or estimated."""

    width: int
    height: int
    fps: float
    num_frames: int


class InspectedClip(Config):
    """A clip with hashed sources. `headers` has None for a video whose header cannot be read: building says why.

    `failure` is set when not even the build may touch it.
    """

    clip: Clip
    headers: tuple[VideoHeader | None, ...] = ()
    failure: Failure | None = None


class PlannedClip(Config):
    """One sample to build: frames `first_frame` to `end_frame` (None: the last) of the clip's videos."""

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


def make_plan(inspected: Sequence[InspectedClip], *, corpus: str, name: str, recipe: Recipe) -> Plan:
    """Same inputs and recipe, same plan, in whatever order the inputs come."""
    ordered = sorted(inspected, key=lambda item: item.clip.source_id)
    kept, failures = _drop_duplicates(ordered)
    splits = _splits([item.clip for item in kept], recipe)
    samples = [sample for item in kept for sample in _cut(item, splits[item.clip.source_id], recipe)]
    identity = {
        "plan_version": PLAN_VERSION,
        "corpus": corpus,
        "recipe": recipe.identity(),
        "inputs": [item.to_json() for item in ordered],
    }
    return Plan(
        plan_id=sha256_json(identity),
        name=name,
        corpus=corpus,
        recipe=recipe.identity(),
        shards=_assign(samples, failures, recipe),
        inputs=tuple(sorted({video.sha256 for item in ordered for video in item.clip.videos if video.sha256})),
        estimated_hours=sum(_seconds(item.headers) for item in kept) / 3600,
    )


def sample_key(clip: Clip, first_frame: int = 0) -> str:
    """The sample's name in the tar: a hash of its name in the corpus, its sources and its place in them."""
    return sha256_json([clip.source_id, [video.sha256 for video in clip.videos], first_frame])[:16]


def failure_of(clip: Clip, *, stage: str, reason: str, message: str, video: int = 0, first_frame: int = 0) -> Failure:
    """A ledger entry for a clip; `video` is the index of the one to blame."""
    blamed = clip.videos[video] if clip.videos else None
    return Failure.parse(
        {
            "key": sample_key(clip, first_frame),
            "source_id": clip.source_id,
            "path": blamed.path if blamed else clip.trajectory,
            "sha256": blamed.sha256 if blamed else "",
            "stage": stage,
            "reason": reason,
            "message": message,
        }
    )


def _drop_duplicates(ordered: Iterable[InspectedClip]) -> tuple[list[InspectedClip], list[Failure]]:
    """Clips of equal content after the first are failures. Unreadable ones are not compared: each says its reason."""
    kept, failures, first_with = [], [], dict[str, str]()
    for item in ordered:
        if item.failure is not None:
            failures.append(item.failure)
            continue
        if item.headers and all(item.headers):
            videos = [video.sha256 for video in item.clip.videos]
            content = sha256_json([videos, item.clip.start_s, item.clip.end_s])
            original = first_with.setdefault(content, item.clip.source_id)
            if original != item.clip.source_id:
                message = f"same content as {original}"
                failures.append(failure_of(item.clip, stage="plan", reason="duplicate", message=message))
                continue
        kept.append(item)
    return kept, failures


def _splits(clips: list[Clip], recipe: Recipe) -> dict[str, Split]:
    """Systematic sampling of whole sources in seeded order within each label: every label gives its share."""
    ordered = sorted(clips, key=lambda clip: (clip.label, _draw(recipe.seed, "split", clip.source_id)))
    share, offset = recipe.validation_share, _draw(recipe.seed, "offset", "")
    return {
        clip.source_id: "validation"
        if math.floor((number + 1) * share + offset) > math.floor(number * share + offset)
        else "train"
        for number, clip in enumerate(ordered)
    }


def _cut(item: InspectedClip, split: Split, recipe: Recipe) -> list[PlannedClip]:
    """Spans of nearly equal length, none longer than the recipe allows; the last runs to the source's end."""
    clip = item.clip
    header = next((header for header in item.headers if header is not None), None)
    frames = header.num_frames if header else 0
    first, end = _window(clip, header)
    length = (end if end is not None else frames) - first
    num_spans = max(1, math.ceil(length / recipe.max_frames_per_clip))
    cuts = [first + length * number // num_spans for number in range(num_spans)]
    ends: list[int | None] = [*cuts[1:], end]
    size = sum(_estimate(header, recipe) for header in item.headers)
    return [
        PlannedClip(
            key=sample_key(clip, start),
            clip=clip,
            first_frame=start,
            end_frame=stop,
            split=split,
            estimated_bytes=int(size * max(length, 1) // num_spans),
        )
        for start, stop in zip(cuts, ends, strict=True)
    ]


def _window(clip: Clip, header: VideoHeader | None) -> tuple[int, int | None]:
    """The clip's seconds as frames of its first video."""
    if header is None:
        return 0, None
    first = round((clip.start_s or 0.0) * header.fps)
    end = None if clip.end_s is None else round(clip.end_s * header.fps)
    return first, end


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
    for sample in sorted(samples, key=lambda sample: (_draw(recipe.seed, "shard", sample.key), sample.key)):
        weight, shard = heapq.heappop(lightest)
        clips[shard].append(sample)
        heapq.heappush(lightest, (weight + max(sample.estimated_bytes, 1), shard))
    refused: dict[int, list[Failure]] = defaultdict(list)
    for failure in failures:
        refused[int(_draw(recipe.seed, "shard", failure.key) * num_shards)].append(failure)
    return tuple(
        PlannedShard(shard=shard, clips=tuple(clips[shard]), failures=tuple(refused[shard]))
        for shard in range(num_shards)
    )


def _seconds(headers: tuple[VideoHeader | None, ...]) -> float:
    return sum(header.num_frames / header.fps for header in headers[:1] if header is not None)


def _draw(seed: int, purpose: str, name: str) -> float:
    """Uniform in [0, 1) from a hash: the same on every machine and in every order."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
