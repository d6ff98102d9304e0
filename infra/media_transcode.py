"""One source video in, what a shard stores of it out, by either engine. The same code in a worker and in isolation."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
import simplejpeg

from infra.media import DEFAULT_LIMITS, MediaError, Timeline, VideoLimits, fit, reason_of, scan
from infra.media_decode import Planes, decode_planes, diagnose, upright_size
from infra.media_encode import DEFAULT_H264, H264Settings, encode_jpeg_planes, h264_of_planes
from infra.media_ffmpeg import FfmpegJob, ffmpeg_h264, ffmpeg_planes, ffmpeg_version

HASH_NAME = re.compile(r"[0-9a-f]{64}")
MAX_TIMELINES = 64
MAX_JPEG_SIDE = 65_500  # libjpeg's
_TIMELINES: dict[tuple[object, ...], Timeline] = {}
LUMA_GRID = 8  # pixels between those that are looked at
LEAST_SHARE_OF_PART = 0.5  # of the seconds a corpus names, the file must have at least that share


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

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an upright picture is stored with."""
        size = fit(width, height, self.short_side, even=self.layout == "video")
        pixels = size[0] * size[1]
        if max(size) > MAX_JPEG_SIDE or pixels > self.limits.max_frame_pixels:
            raise MediaError("too_large", f"{width}x{height} would be stored as {size[0]}x{size[1]}")
        return size


@dataclass(frozen=True)
class Span:
    """Frames `first` to `end` (None: the last) of the part `start_s` to `end_s` of a file (None: all of it).

    Seconds count from the file's first frame, frames from the part's.
    """

    first: int = 0
    end: int | None = None
    start_s: float | None = None
    end_s: float | None = None


WHOLE = Span()


@dataclass(frozen=True)
class Transcoded:
    """Stored bytes of one camera: JPEGs in order, or a single MP4.

    `source_frames` and `frame_numbers` count within the part. `timestamps_s` (N,) are the source times of the stored
    frames since the part's first one. `brightness` (N,) and `change` (N - 1,) are luma levels from 0 to 255: a stored
    frame's mean, and the mean difference to the one before. `declares_length`: the container says how many frames it
    has. `seconds` tells where the time went; it differs from run to run.
    """

    members: tuple[bytes, ...]
    width: int
    height: int
    fps: float
    source_frames: int
    frame_numbers: tuple[int, ...]
    timestamps_s: npt.NDArray[np.float64]
    brightness: npt.NDArray[np.float64]
    change: npt.NDArray[np.float64]
    declares_length: bool
    seconds: dict[str, float] = field(default_factory=dict)


def transcode(path: Path, settings: TranscodeSettings, *, span: Span = WHOLE) -> Transcoded:
    """Decode, scale and encode the frames of the span. Raises `MediaError`."""
    started = time.perf_counter()
    timeline = timeline_of(path, settings.limits)
    offset, count = part_of(timeline, span)
    first, end = span.first, count if span.end is None else span.end
    if not 0 <= first < end <= count:
        raise MediaError("short_decode", f"frames {first} to {end} are not all in a video of {count}")
    place = (offset + first, offset + end)
    size = (0, 0) if settings.engine == "pyav" else settings.size(*upright_size(path, limits=settings.limits))
    job = FfmpegJob(path, timeline, size, place, settings.stride, settings.hwaccel, settings.timeout_s)
    scanned, meter = time.perf_counter(), _Meter(full_range=settings.layout == "frames")
    try:
        members = _jpegs(job, settings, meter) if settings.layout == "frames" else _mp4(job, settings, meter)
    except MediaError as error:
        if settings.engine == "pyav" or error.reason != "decode_error":
            raise
        raise diagnose(path, timeline, error.message, limits=settings.limits) from None
    except (av.FFmpegError, ValueError, OverflowError) as error:  # of a scaler or encoder: sizes they cannot take
        raise MediaError("decode_error", f"its pictures cannot be stored: {reason_of(error)}") from None
    numbers = np.asarray(job.frame_numbers)
    total = time.perf_counter() - scanned
    return Transcoded(
        members=members,
        width=meter.size[0],
        height=meter.size[1],
        fps=timeline.info.fps / settings.stride,
        source_frames=count,
        frame_numbers=tuple((numbers - offset).tolist()),
        timestamps_s=timeline.timestamps_s[numbers] - timeline.timestamps_s[offset],
        brightness=np.asarray(meter.brightness),
        change=np.asarray(meter.change),
        declares_length=timeline.info.declared_frames is not None,
        seconds={"probe": scanned - started, "decode": meter.seconds, "encode": total - meter.seconds},
    )


def timeline_of(path: Path, limits: VideoLimits = DEFAULT_LIMITS) -> Timeline:
    """`scan`, remembered: many clips may share one long file. Raises `MediaError`."""
    try:
        status = path.stat()
    except OSError as error:
        raise MediaError("not_found", f"the file cannot be read: {error.strerror}") from None
    # A file named by its hash is in the shard cache, which touches it at every use.
    changed = 0 if HASH_NAME.fullmatch(path.name) else status.st_mtime_ns
    key = (status.st_dev, status.st_ino, status.st_size, changed, limits)
    if key not in _TIMELINES:
        _TIMELINES[key] = scan(path, limits=limits)
        while len(_TIMELINES) > MAX_TIMELINES:
            _TIMELINES.pop(next(iter(_TIMELINES)), None)
    return _TIMELINES[key]


def part_of(timeline: Timeline, span: Span) -> tuple[int, int]:
    """(first frame, number of frames) of the span's part; a frame belongs where its time is, give or take half a frame.

    Raises `MediaError`: `wrong_duration` where the file has less than half of the part.
    """
    if span.start_s is None and span.end_s is None:
        return 0, timeline.num_frames
    times = timeline.timestamps_s
    # Of the shortest distance: where the rate varies, half an average frame may be a whole one.
    half = 0.5 * min(1 / timeline.info.fps, float(np.diff(times).min(initial=np.inf)))
    start, end = span.start_s or 0.0, span.end_s
    first = int(np.searchsorted(times, start - half))
    stop = timeline.num_frames if end is None else int(np.searchsorted(times, end - half))
    length_s = float(times[-1]) + 1 / timeline.info.fps
    if stop <= first or (end is not None and length_s - start < LEAST_SHARE_OF_PART * (end - start)):
        asked = f"{start:.2f} s to {'its end' if end is None else f'{end:.2f} s'}"
        raise MediaError("wrong_duration", f"the clip is {asked} of a video that ends at {length_s:.2f} s")
    return first, stop - first


def engine_fingerprint(engine: str) -> dict[str, str]:
    """Versions that decide the bytes, for the receipt."""
    versions = {name: ".".join(map(str, av.library_versions[name])) for name in ("libavcodec", "libswscale")}
    versions |= {"engine": engine, "av": av.__version__, "simplejpeg": simplejpeg.__version__}
    versions["machine"] = platform.machine()  # scalers differ in rounding between instruction sets
    if engine == "ffmpeg":
        versions["ffmpeg"] = ffmpeg_version()
    return versions


class _Meter:
    """Looks at every stored frame on its way to the encoder, and at the clock."""

    def __init__(self, *, full_range: bool) -> None:
        self.brightness: list[float] = []
        self.change: list[float] = []
        self.seconds = 0.0
        self.size = (0, 0)
        self._black, self._scale = (0, 1.0) if full_range else (16, 255 / 219)
        self._last: npt.NDArray[np.int16] | None = None

    def pass_on(self, frames: Iterable[Planes]) -> Iterator[Planes]:
        """The frames as they come; the time their source takes is counted."""
        source = iter(frames)
        while True:
            started = time.perf_counter()
            planes = next(source, None)
            self.seconds += time.perf_counter() - started
            if planes is None:
                return
            self._look(planes)
            yield planes

    def _look(self, planes: Planes) -> None:
        self.size = (planes.y.shape[1], planes.y.shape[0])
        grid = planes.y[::LUMA_GRID, ::LUMA_GRID].astype(np.int16)
        # Sums of integers: several times quicker than numpy's mean, and the same on every machine.
        self.brightness.append(max(0.0, int(grid.sum()) / grid.size - self._black) * self._scale)
        if self._last is not None:
            self.change.append(int(np.abs(grid - self._last).sum()) / grid.size * self._scale)
        self._last = grid


def _jpegs(job: FfmpegJob, settings: TranscodeSettings, meter: _Meter) -> tuple[bytes, ...]:
    frames = ffmpeg_planes(job) if settings.engine == "ffmpeg" else _planes(job, settings)
    return tuple(encode_jpeg_planes(planes, quality=settings.jpeg_quality) for planes in meter.pass_on(frames))


def _mp4(job: FfmpegJob, settings: TranscodeSettings, meter: _Meter) -> tuple[bytes, ...]:
    fps = job.timeline.info.fps / settings.stride
    if settings.engine == "ffmpeg":
        data = ffmpeg_h264(job, fps=fps, settings=settings.h264, encoder=settings.video_encoder)
        stored = scan(data)
        if stored.num_frames != len(job.frame_numbers):
            raise MediaError("short_decode", f"ffmpeg stored {stored.num_frames} of {len(job.frame_numbers)} frames")
        for _ in meter.pass_on(decode_planes(data, stored, size=_as_it_is, full_range=False)):
            pass  # its frames never passed through this process
        return (data,)
    frames = meter.pass_on(_planes(job, settings))
    return (h264_of_planes(frames, fps=fps, settings=settings.h264),)


def _planes(job: FfmpegJob, settings: TranscodeSettings) -> Iterator[Planes]:
    return decode_planes(
        job.path,
        job.timeline,
        size=settings.size,
        full_range=settings.layout == "frames",
        span=job.span,
        stride=job.stride,
        limits=settings.limits,
    )


def _as_it_is(width: int, height: int) -> tuple[int, int]:
    return width, height
