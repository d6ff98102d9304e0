"""The records that ingest, readers and lineage agree on. Plain frozen models; their JSON is the file format."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from infra.config import Config

SCHEMA_VERSION = 1
DEFAULT_CAMERA = "main"
Layout = Literal["frames", "video"]

ReasonCode = Literal[
    "empty",  # zero bytes
    "not_video",  # content is no container we accept, whatever the name says
    "truncated",  # the container or stream ends early
    "short_decode",  # decoded fewer frames than the container or the annotation declares
    "no_video_stream",
    "too_large",  # pixels x frames beyond the recipe's bound
    "bad_timestamps",
    "bad_annotation",  # the sidecar is missing, malformed, or disagrees with the video
    "duplicate",  # same content hash as an earlier clip
    "crash",  # the decoder died in the isolated second attempt
    "timeout",  # the decoder hung in the isolated second attempt
    "unreadable",  # the source could not be read from storage
    "decode_error",  # any other typed decoder error
]


class SourceVideo(Config):
    """A file as it came, identified by content. `path` is relative to the corpus root."""

    camera: str = DEFAULT_CAMERA
    path: str
    sha256: str = ""  # empty until planned
    size_bytes: int = 0


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
    metadata: dict[str, Any] = Field(default_factory=dict)


class CameraRecord(Config):
    """One camera's stored frames. `frame_numbers[i]` is the source frame stored as frame index i; None means i."""

    source: SourceVideo
    width: int
    height: int
    fps: float
    num_frames: int
    frame_numbers: tuple[int, ...] | None = None


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
    stage: Literal["plan", "read", "probe", "decode", "encode", "annotation"]
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
