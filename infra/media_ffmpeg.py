"""The second engine: the ffmpeg program, for machines whose decoder or encoder is hardware.

ffmpeg-python builds the argument lists and nothing else; `infra.supervise` runs them.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg
import numpy as np

from infra.errors import MachineError
from infra.media import DEMUXERS, MediaError, Timeline
from infra.media_decode import Planes
from infra.media_encode import H264Settings
from infra.supervise import Outcome, Supervised, run

ADDRESS = re.compile(r"0x[0-9a-f]+")


@dataclass(frozen=True)
class FfmpegJob:
    """One video to convert: which frames, at what size (width, height), with which hardware."""

    path: Path
    timeline: Timeline
    size: tuple[int, int]
    span: tuple[int, int]
    stride: int = 1
    hwaccel: str = ""  # e.g. "cuda"
    timeout_s: float = 600.0

    @property
    def frame_numbers(self) -> range:
        """The source frames that must come out."""
        return range(self.span[0], self.span[1], self.stride)


@lru_cache(maxsize=1)
def ffmpeg_binary() -> str:
    """The installed ffmpeg, else the one that imageio-ffmpeg brings."""
    installed = shutil.which("ffmpeg")
    if installed:
        return installed
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise MachineError(f"no ffmpeg program: {error}.", remedy="Run: apt-get install ffmpeg") from None


@lru_cache(maxsize=1)
def ffmpeg_version() -> str:
    """First line of `ffmpeg -version`, part of the engine fingerprint."""
    with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
        output = Path(folder) / "version"
        run([ffmpeg_binary(), "-version"], timeout_s=30, stdout=output)
        words = output.read_text(errors="replace").split()
    return words[2] if len(words) > 2 else "unknown"


def planes_command(job: FfmpegJob) -> list[str]:
    """argv that writes full-range yuv420p frames to standard output."""
    video = _filtered(job, colour_range="full")
    output = ffmpeg.output(video, "pipe:1", format="rawvideo", pix_fmt="yuv420p", fps_mode="passthrough", threads=1)
    return _compiled(output)


def h264_command(job: FfmpegJob, target: Path, *, fps: float, settings: H264Settings, encoder: str) -> list[str]:
    """argv that writes a constant-rate MP4. Options of x264 are given to x264 only."""
    rate = Fraction(fps).limit_denominator(1001 * 100)
    video = _filtered(job, colour_range="limited")
    video = video.filter("settb", f"{rate.denominator}/{rate.numerator}").filter("setpts", "N")
    options: dict[str, Any] = {"vcodec": encoder, "g": settings.gop, "bf": 0, "pix_fmt": "yuv420p", "threads": 1}
    if encoder == "libx264":
        options |= settings.options()
    else:
        options |= {"cq": settings.crf} if "nvenc" in encoder else {"qp": settings.crf}
    colours = {"colorspace": "smpte170m", "color_primaries": "smpte170m", "color_trc": "smpte170m", "color_range": "tv"}
    container = {"movflags": "+faststart", "fflags": "+bitexact", "flags": "+bitexact+cgop", "map_metadata": -1}
    output = ffmpeg.output(
        video, f"file:{target}", format="mp4", fps_mode="passthrough", **options, **colours, **container
    )
    return _compiled(output)


def ffmpeg_planes(job: FfmpegJob) -> Iterator[Planes]:
    """The job's frames as full-range planes. Raises `MediaError`; a wrong number of frames is one."""
    width, height = job.size
    half_width, half_height = (width + 1) // 2, (height + 1) // 2
    luma, chroma = width * height, half_width * half_height
    with Supervised(planes_command(job), timeout_s=job.timeout_s) as child:
        assert child.stdout is not None
        count = 0
        for number in job.frame_numbers:
            data = child.stdout.read(luma + 2 * chroma)
            if len(data) < luma + 2 * chroma:
                break
            flat = np.frombuffer(data, np.uint8)
            yield Planes(
                flat[:luma].reshape(height, width),
                flat[luma : luma + chroma].reshape(half_height, half_width),
                flat[luma + chroma :].reshape(half_height, half_width),
                number,
            )
            count += 1
        surplus = child.stdout.read(1)
        outcome = child.finish() if not surplus else None
    _check(outcome, count, job)


def ffmpeg_h264(job: FfmpegJob, *, fps: float, settings: H264Settings, encoder: str) -> bytes:
    """The job's frames as an MP4. The caller compares the number of frames stored with those asked for."""
    with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
        target = Path(folder) / "video.mp4"
        argv = h264_command(job, target, fps=fps, settings=settings, encoder=encoder)
        outcome = run(argv, timeout_s=job.timeout_s, cwd=Path(folder))
        _check(outcome, len(job.frame_numbers), job)
        return target.read_bytes()


def _filtered(job: FfmpegJob, *, colour_range: str) -> Any:
    first, end = job.span
    options: dict[str, Any] = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS, "threads": 1}
    options["err_detect"] = "explode"
    if job.hwaccel:
        options["hwaccel"] = job.hwaccel
    if first and job.timeline.info.container != "avi":  # which stores no times to seek to
        # Half a frame early: the seek is exact to the frame whose time is at or after it.
        options["ss"] = f"{job.timeline.timestamps_s[first] - 0.5 / job.timeline.info.fps:.6f}"
        first, end = 0, end - first
    video = ffmpeg.input(f"file:{job.path.absolute()}", **options).video
    video = video.filter("trim", start_frame=first, end_frame=end)
    if job.stride > 1:
        video = video.filter("select", f"not(mod(n,{job.stride}))")
    width, height = job.size
    return video.filter(
        "scale", width, height, flags="bicubic+accurate_rnd", out_range=colour_range, out_color_matrix="bt601"
    )


def _compiled(output: Any) -> list[str]:
    quiet = output.global_args("-nostdin", "-hide_banner", "-loglevel", "error", "-xerror", "-y")
    return [str(part) for part in quiet.compile(cmd=ffmpeg_binary())]


def _check(outcome: Outcome | None, count: int, job: FfmpegJob) -> None:
    expected = len(job.frame_numbers)
    if outcome is None:
        raise MediaError("bad_timestamps", f"ffmpeg gave more than the {expected} frames asked for")
    if outcome.timed_out:
        raise MediaError("timeout", f"ffmpeg did not end within {job.timeout_s:g} s")
    if outcome.crashed:
        raise MediaError("crash", f"ffmpeg was ended by signal {-outcome.returncode}")
    if outcome.returncode:
        lines = outcome.stderr_tail.splitlines() or ["no message"]
        text = ADDRESS.sub("0x", lines[0]).replace(str(job.path.absolute()), "the file")
        raise MediaError("decode_error", f"ffmpeg ended with {outcome.returncode}: {text}")
    if count != expected:
        raise MediaError("short_decode", f"ffmpeg gave {count} of {expected} frames")
