"""Pictures that a data set stores one by one, joined into a video file without being encoded again.

JPEGs and PNGs are copied into a QuickTime container as they are, arrays as uncompressed PNGs. What comes out goes
through the very guards, checks, engines and limits of every other source video, and no pixel changes on the way.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import simplejpeg
from PIL import Image as PillowImage

from infra.media import DEFAULT_LIMITS, MAX_FPS, MIN_FPS, MediaError, reason_of
from infra.media_decode import Image

JPEG_MAGIC, PNG_MAGIC = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
PNG_SIZE = struct.Struct(">II")  # behind the magic and the 8 bytes that start the first chunk
SUFFIX = ".mov"


@dataclass(frozen=True)
class Pictures:
    """Frames in order, each a JPEG, a PNG or an (H, W, 3) uint8 RGB array, all of one kind and size."""

    frames: Iterable[bytes | Image]
    fps: float


def join_pictures(pictures: Pictures, path: Path) -> str:
    """Write the pictures to `path` (.mov) and return the sha256 of their content, whatever libraries wrote the file.

    Raises `MediaError`: `empty` for no picture, `not_video` for one of another format or kind, `short_decode` for one
    whose size differs.
    """
    if not MIN_FPS <= pictures.fps <= MAX_FPS:
        raise MediaError("bad_timestamps", f"the frame rate is {pictures.fps:g}, not within {MIN_FPS}..{MAX_FPS}")
    try:
        return _join(pictures, path)
    except (av.FFmpegError, OverflowError) as error:
        raise MediaError("not_video", f"its pictures cannot be joined: {reason_of(error)}") from None


def _join(pictures: Pictures, path: Path) -> str:
    content, first, tick = hashlib.sha256(), None, 1 / Fraction(pictures.fps).limit_denominator(1001 * 100)
    with av.open(str(path), "w", format="mov", options={"fflags": "+bitexact"}) as container:
        for number, frame in enumerate(pictures.frames):
            data = frame if isinstance(frame, bytes) else _png(frame, number)
            shape = _shape(data, number)
            if first is None:
                if not 0 < shape[1] * shape[2] <= DEFAULT_LIMITS.max_frame_pixels:
                    raise MediaError("too_large", f"picture {number} is {_words(shape)}")
                first, (codec, width, height) = shape, shape
                stream = container.add_mux_stream(codec, rate=1 / tick, width=width, height=height)
                stream.time_base = tick
            if shape != first:
                raise MediaError("short_decode", f"picture {number} is {_words(shape)}, the first is {_words(first)}")
            raw = data if isinstance(frame, bytes) else np.ascontiguousarray(frame).tobytes()
            content.update(len(raw).to_bytes(8, "big") + raw)
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, tick
            packet.pts = packet.dts = number
            packet.duration, packet.is_keyframe = 1, True
            container.mux(packet)
    if first is None:
        raise MediaError("empty", "there is no picture")
    return content.hexdigest()


def _png(frame: Image, number: int) -> bytes:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise MediaError("not_video", f"picture {number} is {frame.dtype} of shape {frame.shape}, not RGB")
    buffer = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(frame)).save(buffer, "png", compress_level=0)
    return buffer.getvalue()


def _shape(data: bytes, number: int) -> tuple[str, int, int]:
    """(codec, width, height) from the header."""
    if data[:8] == PNG_MAGIC and len(data) > 24:
        return "png", *PNG_SIZE.unpack_from(data, 16)
    if data[:3] == JPEG_MAGIC:
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise MediaError("truncated", f"picture {number} is no readable JPEG: {error}") from None
        return "mjpeg", width, height
    raise MediaError("not_video", f"picture {number} is neither JPEG nor PNG: it starts with {data[:8]!r}")


def _words(shape: tuple[str, int, int]) -> str:
    return f"{shape[0]} of {shape[1]}x{shape[2]}"
