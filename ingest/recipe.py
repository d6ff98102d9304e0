"""What an ingest does: the recipe decides the bytes, the config adds where from and where to."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from infra.config import Config
from infra.media import VideoLimits
from infra.media_encode import H264Settings
from infra.media_transcode import TranscodeSettings
from ingest.downloads import DownloadConfig
from ingest.schema import Layout

# How a run behaves when something goes wrong; another value must not make another data set.
NOT_IDENTITY = frozenset({"max_failure_share", "item_timeout_s", "item_memory_bytes"})


class Recipe(Config):
    """How source videos become samples. `max_failure_share` and the `item_` limits do not belong to its identity."""

    layout: Layout = "frames"
    short_side: int | None = Field(default=256, ge=16, description="pixels; None keeps the source's size")
    jpeg_quality: int = Field(default=90, ge=1, le=100)
    crf: int = Field(default=21, ge=0, le=51)
    gop: int = Field(default=8, ge=1)
    engine: Literal["pyav", "ffmpeg"] = "pyav"
    hwaccel: str = Field(default="", description="ffmpeg engine only, e.g. cuda")
    video_encoder: str = Field(default="libx264", description="ffmpeg engine only, e.g. h264_nvenc")
    shard_bytes: int = Field(default=256 << 20, ge=1, description="planned size of a tar")
    max_frames_per_clip: int = Field(default=300, ge=2, description="longer sources are cut into spans")
    frame_stride: int = Field(default=1, ge=1)
    max_frame_pixels: int = Field(default=VideoLimits.max_frame_pixels, ge=1)
    max_video_pixels: int = Field(default=VideoLimits.max_video_pixels, ge=1)
    max_failure_share: float = Field(default=0.10, ge=0, le=1)
    item_timeout_s: float = Field(default=600.0, gt=0)
    item_memory_bytes: int = Field(default=4 << 30, ge=512 << 20)
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    validation_counts: dict[str, int] = Field(
        default={}, description="clips held out of the data sets named here, in place of the share"
    )
    split_by: Literal["draw", "source", "paper"] = Field(
        default="draw", description="draw: by count and share; source: as the corpus says; paper: as VPP holds out"
    )
    near_duplicate_bits: int | None = Field(
        default=None,
        ge=0,
        le=32,
        description="drop clips that differ from an earlier one in at most so many of 256 bits",
    )
    max_frozen_share: float | None = Field(default=None, ge=0, le=1, description="of a clip, in which nothing moves")
    max_black_share: float | None = Field(default=None, ge=0, le=1, description="of a clip, which is black")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _hardware_needs_ffmpeg(self) -> Self:
        if self.engine == "pyav" and (self.hwaccel or self.video_encoder != "libx264"):
            raise ValueError("hwaccel and video_encoder are read by engine=ffmpeg only")
        return self

    def identity(self) -> dict[str, Any]:
        """The part that decides the data set."""
        return {key: value for key, value in self.to_json().items() if key not in NOT_IDENTITY}

    def limits(self) -> VideoLimits:
        """What is refused before it is decoded."""
        return VideoLimits(self.max_frame_pixels, self.max_video_pixels)

    def transcoding(self) -> TranscodeSettings:
        """The part the engines need."""
        return TranscodeSettings(
            layout=self.layout,
            engine=self.engine,
            short_side=self.short_side,
            stride=self.frame_stride,
            jpeg_quality=self.jpeg_quality,
            h264=H264Settings(crf=self.crf, gop=self.gop),
            hwaccel=self.hwaccel,
            video_encoder=self.video_encoder,
            timeout_s=self.item_timeout_s,
            limits=self.limits(),
        )


class IngestConfig(Config):
    """One ingest: corpus module, source and output (local folders or `s3://` prefixes), recipe.

    `workers` 0 builds in this process; otherwise Ray Data builds that many shards at a time, None as many as the
    cluster (or this machine) has CPUs. `replay_failures` is another data set of the same corpus: only the clips that
    failed there are built, into a child of it.
    """

    kind: Literal["ingest"] = "ingest"
    corpus: str = "folder"
    source: str
    output: str
    name: str
    recipe: Recipe = Recipe()
    workers: int | None = Field(default=None, ge=0)
    replay_failures: str = ""
    downloads: str = Field(default="", description="corpus urls: folder or prefix of the files; default OUT/downloads")
    download: DownloadConfig = DownloadConfig()
    retry_failed: bool = Field(default=False, description="corpus urls: fetch what failed again")


def small_pictures(layout: Layout) -> Recipe:
    """For simulated corpora, whose pictures are small already: the source's size, nearly lossless, small shards."""
    return Recipe(layout=layout, short_side=None, jpeg_quality=95, crf=14, shard_bytes=4 << 20)
