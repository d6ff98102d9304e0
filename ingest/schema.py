"""The records that ingest, readers and lineage agree on. Plain frozen models; their JSON is the file format."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from infra.config import Config

SCHEMA_VERSION = 1
DEFAULT_CAMERA = "main"
PLAN_NAME = "plan.json"
Layout = Literal["frames", "video"]

ReasonCode = Literal[
    "not_found",  # the corpus names a file that is not there, or an address answers so
    "empty",  # zero bytes
    "not_video",  # content is no container we accept, whatever the name says
    "hostile_container",  # a playlist or script that would make a decoder open other files or addresses
    "truncated",  # the container or stream ends early
    "short_decode",  # decoded fewer frames than the container or the annotation declares
    "wrong_duration",  # the container declares another length than its frames have, or the clip's seconds lie outside
    "no_video_stream",
    "too_large",  # pixels x frames beyond the recipe's bound
    "bad_timestamps",
    "bad_annotation",  # the sidecar is missing, malformed, or disagrees with the video
    "duplicate",  # same content hash as an earlier clip
    "near_duplicate",  # looks like an earlier clip; only where the recipe asks for this filter
    "frozen",  # nothing moves in too much of it; only where the recipe asks for this filter
    "black",  # too much of it is black; only where the recipe asks for this filter
    "download_refused",  # an address that is not asked: private network, unknown scheme, too many redirects, too large
    "download_failed",  # the server or the network failed, after the bounded retries
    "crash",  # the decoder died in the isolated second attempt
    "timeout",  # the decoder hung in the isolated second attempt
    "unreadable",  # the source is there but cannot be read, or is not the one that was planned
    "decode_error",  # undecodable: any other typed decoder error
]
# Decisions about sound sources: listed in the ledger like failures, but no fault of the corpus.
DECISIONS = frozenset({"duplicate", "near_duplicate", "frozen", "black"})


class SourceVideo(Config):
    """One camera's pictures as they came, identified by content. `path` is relative to the corpus root.

    `start_s`/`end_s` are the half-open seconds of the file that are this camera's, where several clips share a file
    and each camera has its own place in its own (they go before the clip's). `pictures` says that there is no video
    file: the corpus module reads the frames one by one, and `path` names where they begin.
    """

    camera: str = DEFAULT_CAMERA
    path: str
    sha256: str = ""  # empty until planned
    size_bytes: int = 0
    start_s: float | None = None
    end_s: float | None = None
    pictures: bool = False


class Clip(Config):
    """One clip or episode a corpus offers: what to cut, from which sources, with which words and arrays.

    `start_s`/`end_s` are half-open seconds of the source, `None` for the whole file. `trajectory` is the path
    (relative to the corpus root) the corpus module reads actions and states from, "" if there are none.
    """

    source_id: str  # stable and human-readable, unique in the corpus, e.g. "drawer-open/seed-00012"
    videos: tuple[SourceVideo, ...]
    start_s: float | None = None
    end_s: float | None = None
    text: str = ""
    label: str = ""
    declared_num_frames: int | None = None
    trajectory: str = ""
    problem: str = ""  # why the annotation cannot be used; such a clip ends in the ledger as bad_annotation
    refused: tuple[ReasonCode, str] | None = None  # why its download gave no file: reason and message for the ledger
    metadata: dict[str, Any] = Field(default_factory=dict)


class CameraRecord(Config):
    """One camera's stored frames. `frame_numbers[i]` is the source frame stored as frame index i; None means i.

    Source frames count from the start of the clip's part of the file. `length` says what the number of frames was held
    against: the container's own count, the corpus's annotation, or nothing (a WebM without annotation declares none).
    `motion` and `brightness` are mean luma levels (0 to 255): how much a pixel changes between stored frames, and how
    light it is.
    """

    source: SourceVideo
    width: int
    height: int
    fps: float
    num_frames: int
    frame_numbers: tuple[int, ...] | None = None
    length: Literal["declared", "annotated", "unverified"] = "declared"
    motion: float | None = None
    brightness: float | None = None


class SampleRecord(Config):
    """`K.json`: everything known of one sample of a shard except its pixels, words and arrays."""

    schema_version: int = SCHEMA_VERSION
    key: str
    source_id: str
    corpus: str
    layout: Layout
    cameras: dict[str, CameraRecord]
    start_s: float | None = None
    end_s: float | None = None
    text: str = ""
    label: str = ""
    has_arrays: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)


class Failure(Config):
    """One rejected clip in a shard's receipt: the failure ledger is the union of these."""

    key: str
    source_id: str
    path: str
    sha256: str
    stage: Literal["download", "plan", "read", "probe", "decode", "encode", "annotation", "filter"]
    reason: ReasonCode
    message: str


class Receipt(Config):
    """`shard-NNNNN.receipt.json`, the commit record of a shard. A function of the plan alone."""

    schema_version: int = SCHEMA_VERSION
    shard: int
    plan_id: str
    tar_sha256: str
    idx_sha256: str
    tar_bytes: int
    num_samples: int
    num_frames: int
    num_members: int
    failures: tuple[Failure, ...] = ()
    engine: dict[str, str] = Field(default_factory=dict)  # versions that decide the bytes
    statistics: dict[str, Any] = Field(default_factory=dict)  # sums and histograms that the manifest adds up


class Manifest(Config):
    """`manifest.json`, written once when all receipts exist. The data set's version is the sha256 of the file."""

    schema_version: int = SCHEMA_VERSION
    name: str
    corpus: str
    layout: Layout
    plan_id: str
    recipe: dict[str, Any]
    receipts: tuple[Receipt, ...]
    num_samples: int
    num_frames: int
    num_failures: int
    statistics: dict[str, Any] = Field(default_factory=dict)
    parent: str = ""  # version of the data set whose failures this one replays
    inputs: tuple[str, ...] = ()  # sha256 of every source video, sorted


def shard_name(shard: int) -> str:
    """`shard-00042`: the stem of a shard's tar, idx, receipt.json and log.json."""
    return f"shard-{shard:05d}"


def frame_suffix(frame_index: int, camera: str = DEFAULT_CAMERA) -> str:
    """Member suffix of one JPEG: `f000042.jpg`, with the camera before it when it is not the default one."""
    stem = f"f{frame_index:06d}.jpg"
    return stem if camera == DEFAULT_CAMERA else f"{camera}.{stem}"


def video_suffix(camera: str = DEFAULT_CAMERA) -> str:
    """Member suffix of one camera's video: `main.mp4`."""
    return f"{camera}.mp4"
