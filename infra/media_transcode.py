"""One source video in, what a shard stores of it out, by either engine. The same code in a worker and in isolation."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
import simplejpeg

from infra.media import DEFAULT_LIMITS, MediaError, VideoLimits, fit, scan
from infra.media_decode import decode_planes, diagnose, upright_size
from infra.media_encode import DEFAULT_H264, H264Settings, encode_jpeg_planes, h264_of_planes
from infra.media_ffmpeg import FfmpegJob, ffmpeg_h264, ffmpeg_planes, ffmpeg_version


@dataclass(frozen=True)
class TranscodeSettings:
    """What decides the stored bytes. `short_side` None keeps the source's size."""

    layout: Literal["frames", "video"] = "frames"
    engine: Literal["pyav", "ffmpeg"] = "pyav"
    short_side: int | None = 256
    stride: int = 1
    jpeg_quality: int = 90
    h264: H264Settings = DEFAULT_H264
    hwaccel: str = ""
    video_encoder: str = "libx264"
    timeout_s: float = 600.0
    limits: VideoLimits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Transcoded:
    """Stored bytes of one camera: JPEGs in order, or a single MP4.

    `timestamps_s` (N,) are the source times of the stored frames since the source's first frame.
    """

    members: tuple[bytes, ...]
    width: int
    height: int
    fps: float
    source_frames: int
    frame_numbers: tuple[int, ...]
    timestamps_s: npt.NDArray[np.float64]


def transcode(path: Path, settings: TranscodeSettings, *, span: tuple[int, int | None] = (0, None)) -> Transcoded:
    """Decode, scale and encode the frames of the span. Raises `MediaError`."""
    timeline = scan(path, limits=settings.limits)
    first, end = span[0], timeline.num_frames if span[1] is None else span[1]
    if not 0 <= first < end <= timeline.num_frames:
        raise MediaError("short_decode", f"frames {first} to {end} are not all in a video of {timeline.num_frames}")
    size = upright_size(path, limits=settings.limits)
    width, height = fit(*size, settings.short_side, even=settings.layout == "video")
    job = FfmpegJob(
        path, timeline, (width, height), (first, end), settings.stride, settings.hwaccel, settings.timeout_s
    )
    try:
        members = _jpegs(job, settings) if settings.layout == "frames" else _mp4(job, settings)
    except MediaError as error:
        if settings.engine == "pyav" or error.reason != "decode_error":
            raise
        raise diagnose(path, timeline, error.message, limits=settings.limits) from None
    numbers = tuple(job.frame_numbers)
    return Transcoded(
        members=members,
        width=width,
        height=height,
        fps=timeline.info.fps / settings.stride,
        source_frames=timeline.num_frames,
        frame_numbers=numbers,
        timestamps_s=timeline.timestamps_s[list(numbers)],
    )


def engine_fingerprint(engine: str) -> dict[str, str]:
    """Versions that decide the bytes, for the receipt."""
    versions = {name: ".".join(map(str, av.library_versions[name])) for name in ("libavcodec", "libswscale")}
    versions |= {"engine": engine, "av": av.__version__, "simplejpeg": simplejpeg.__version__}
    versions["machine"] = platform.machine()  # scalers differ in rounding between instruction sets
    if engine == "ffmpeg":
        versions["ffmpeg"] = ffmpeg_version()
    return versions


def _jpegs(job: FfmpegJob, settings: TranscodeSettings) -> tuple[bytes, ...]:
    if settings.engine == "ffmpeg":
        frames = ffmpeg_planes(job)
    else:
        frames = decode_planes(
            job.path,
            job.timeline,
            size=job.size,
            full_range=True,
            span=job.span,
            stride=job.stride,
            limits=settings.limits,
        )
    return tuple(encode_jpeg_planes(planes, quality=settings.jpeg_quality) for planes in frames)


def _mp4(job: FfmpegJob, settings: TranscodeSettings) -> tuple[bytes, ...]:
    fps = job.timeline.info.fps / settings.stride
    if settings.engine == "ffmpeg":
        data = ffmpeg_h264(job, fps=fps, settings=settings.h264, encoder=settings.video_encoder)
        if (stored := scan(data).num_frames) != len(job.frame_numbers):
            raise MediaError("short_decode", f"ffmpeg stored {stored} of {len(job.frame_numbers)} frames")
        return (data,)
    frames = decode_planes(
        job.path,
        job.timeline,
        size=job.size,
        full_range=False,
        span=job.span,
        stride=job.stride,
        limits=settings.limits,
    )
    return (h264_of_planes(frames, fps=fps, size=job.size, settings=settings.h264),)
