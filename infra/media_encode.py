"""Encoding: JPEG through libjpeg-turbo, H.264 through x264 in process. One thread, so equal input gives equal bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
import simplejpeg
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from infra.media import MediaError
from infra.media_decode import Image, Planes

BT601 = 6  # SMPTE 170M: the value of matrix, primaries and transfer in the stream's header
LIMITED = 1


@dataclass(frozen=True)
class H264Settings:
    """What decides the bytes of a stored video. `gop` 8 without B-frames makes random access cheap."""

    crf: int = 21
    gop: int = 8
    preset: str = "veryfast"
    tune: str = "fastdecode"

    def options(self) -> dict[str, str]:
        """x264's options: closed groups of fixed length, one thread."""
        params = "scenecut=0:open-gop=0:force-cfr=1"
        return {
            "preset": self.preset,
            "tune": self.tune,
            "crf": str(self.crf),
            "g": str(self.gop),
            "keyint_min": str(self.gop),
            "bf": "0",
            "threads": "1",
            "x264-params": params,
        }


DEFAULT_H264 = H264Settings()


def encode_jpeg(image: Image, *, quality: int = 90) -> bytes:
    """(H, W, 3) RGB -> baseline 4:2:0 JPEG."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="420"
    )


def encode_jpeg_planes(planes: Planes, *, quality: int) -> bytes:
    """Full-range planes -> JPEG, without a detour over RGB."""
    return simplejpeg.encode_jpeg_yuv_planes(planes.y, planes.u, planes.v, quality=quality)


def decode_jpeg(data: bytes) -> Image:
    """JPEG -> (H, W, 3) uint8 RGB. Raises `MediaError`."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError as error:
        raise MediaError("decode_error", f"not a readable JPEG: {error}") from None


class H264Writer:
    """Frames in, one constant-rate MP4 out; a context manager that finishes the file."""

    def __init__(self, path: Path, *, fps: float, size: tuple[int, int], settings: H264Settings = DEFAULT_H264) -> None:
        width, height = size
        if width % 2 or height % 2:
            raise MediaError("decode_error", f"H.264 stores even sizes only, not {width}x{height}")
        rate = Fraction(fps).limit_denominator(1001 * 100)
        # No tool versions and dates in the header: they would make equal runs differ.
        self._container = av.open(
            str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
        )
        stream = self._container.add_stream("libx264", rate=rate, options=settings.options())
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.time_base = self._time_base = 1 / rate  # the muxer replaces the stream's own
        codec.flags |= Flags.bitexact | Flags.closed_gop
        codec.colorspace = codec.color_primaries = codec.color_trc = BT601
        codec.color_range = LIMITED
        self._stream = stream
        self._count = 0
        self._converter = VideoReformatter()

    def add_planes(self, planes: Planes) -> None:
        """Append limited-range BT.601 planes of the writer's size."""
        self._encode(_frame_of(planes) if planes.frame is None else planes.frame)

    def add_rgb(self, image: Image) -> None:
        """Append an (H, W, 3) uint8 picture of the writer's size."""
        frame = self._converter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"),
            format="yuv420p",
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        self._encode(frame)

    def _encode(self, frame: Any) -> None:
        frame.pts, frame.time_base = self._count, self._time_base
        frame.pict_type = 0  # the encoder decides, not the source
        self._count += 1
        self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._container.mux(self._stream.encode(None))
        self._container.close()


def encode_video(frames: Iterable[Image], path: Path, *, fps: float, crf: int = 21, gop: int = 8) -> int:
    """Write (H, W, 3) uint8 RGB frames of one even size as an MP4; returns how many. Raises `MediaError` on none."""
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise MediaError("empty", "no frame to encode")
    count = 1
    with H264Writer(path, fps=fps, size=(first.shape[1], first.shape[0]), settings=H264Settings(crf, gop)) as writer:
        writer.add_rgb(first)
        for image in iterator:
            writer.add_rgb(image)
            count += 1
    return count


def h264_of_planes(frames: Iterable[Planes], *, fps: float, settings: H264Settings) -> bytes:
    """A whole MP4 in memory. It passes through a file because a player's index is moved to the front at the end.

    Raises `MediaError` on no frame.
    """
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise MediaError("empty", "no frame to encode")
    height, width = first.y.shape
    with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
        path = Path(folder) / "video.mp4"
        with H264Writer(path, fps=fps, size=(width, height), settings=settings) as writer:
            for planes in chain([first], iterator):
                writer.add_planes(planes)
        return path.read_bytes()


def _frame_of(planes: Planes) -> Any:
    frame = av.VideoFrame(planes.y.shape[1], planes.y.shape[0], "yuv420p")
    for plane, rows in zip(frame.planes, (planes.y, planes.u, planes.v), strict=True):
        padded = np.zeros((plane.buffer_size // plane.line_size, plane.line_size), np.uint8)
        padded[: rows.shape[0], : rows.shape[1]] = rows
        plane.update(padded)
    return frame
