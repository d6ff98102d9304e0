"""Opening foreign video safely, and what can be known of it without decoding a pixel.

Three guards stand before the decoder: the first bytes must be those of a container on the list, libav may use the
`file` protocol only, and only the listed demuxers. So playlists, concat scripts and addresses are refused whatever
their name is. Everything that can be wrong with a video ends as a `MediaError` with a reason code.
"""

from __future__ import annotations

import contextlib
import io
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from infra.errors import DataError
from infra.media_boxes import find_contradiction

VIDEO_SUFFIXES = (".3gp", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
MAX_STREAMS = 64
MIN_FPS, MAX_FPS = 0.1, 1000
MATROSKA_TICK_S = 0.001  # its times are rounded to milliseconds
MIN_REGULAR, MAX_GAPS = 8, 3
MAX_TINY_PACKETS, MIN_PACKET_BYTES = 100_000, 8  # a small file may claim millions of frames of a byte each
_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid")
HEAD_BYTES = 4096
# What makes a demuxer open other files or addresses, or belongs to subtitles; in lower case, at the start of the text.
_REFERRING = re.compile(
    r"#extm3u|#ext-x-|#extinf|ffconcat|\[playlist\]|\[reference\]|\[internetshortcut\]|\[script info\]|webvtt|v=0\s|"
    r"rtsptext|smiltext|[a-z][a-z0-9+.\-]{1,15}://|<\??(?:asx|wpl|svg|smil|sami|mpd|playlist|tt)\b|"
    r"\d+\s+\d+:\d\d:\d\d[,.]\d+\s*-->|\{\d+\}\{\d+\}"
)
_REFERRING_XML = re.compile(r"<(?:\w+:)?(?:svg|smil|mpd|playlist|compositionplaylist|asx)\b|<!entity|\bhref\s*=")

Source = Path | bytes


class MediaError(DataError):
    """A video that cannot be used. `reason` is one of the reason codes of the failure ledger.

    The message never holds a path or an address: it goes into hashed records.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return (MediaError, (self.reason, self.message))


@dataclass(frozen=True)
class VideoLimits:
    """What is refused as `too_large` before it is decoded."""

    max_frame_pixels: int = 36_000_000  # 8192 x 4320 and a little
    max_video_pixels: int = 1_000_000_000_000  # pixels x frames: 2.5 hours of 1080p at 50 fps


DEFAULT_LIMITS = VideoLimits()


@dataclass(frozen=True)
class VideoInfo:
    """The header of a video. `declared_frames` is None where the container does not say (WebM)."""

    container: str
    codec: str
    width: int
    height: int
    fps: float
    declared_frames: int | None
    duration_s: float | None

    @property
    def estimated_frames(self) -> int:
        """Declared count, else duration times rate, else 0."""
        return self.declared_frames or round((self.duration_s or 0) * self.fps)


@dataclass(frozen=True)
class Timeline:
    """The presentation times of a video's frames, from its packets.

    `pts` is sorted, in units of `time_base` seconds; `keyframes` is a sorted subset of it.
    """

    info: VideoInfo
    time_base: Fraction
    pts: npt.NDArray[np.int64]
    keyframes: npt.NDArray[np.int64]

    @property
    def num_frames(self) -> int:
        """How many frames a whole decode must give."""
        return len(self.pts)

    @property
    def timestamps_s(self) -> npt.NDArray[np.float64]:
        """(N,) seconds since the first frame."""
        return np.asarray((self.pts - self.pts[0]) * float(self.time_base), np.float64)


def probe(source: Source, *, limits: VideoLimits = DEFAULT_LIMITS) -> VideoInfo:
    """Read the header only. Raises `MediaError`."""
    with open_video(source, limits=limits) as (_, stream):
        return _describe(stream)


def scan(source: Source, *, limits: VideoLimits = DEFAULT_LIMITS) -> Timeline:
    """Read every packet without decoding: frame times, and whether the file is all there. Raises `MediaError`."""
    with open_video(source, limits=limits) as (container, stream):
        info = _describe(stream)
        _check_size(info, limits, frames=info.estimated_frames)
        packets = _read_packets(container, stream)
        _check_complete(packets, info, stream)
        if info.container == "mov":
            hidden = max(packets.stored, info.declared_frames or 0) - len(packets.pts)
            problem = find_contradiction(source, stream.id, hidden_frames=hidden)
            if problem is not None:
                raise MediaError(*problem)
        time_base = Fraction(stream.time_base)
    if not packets.pts:
        raise MediaError("truncated", "the container holds no frame")
    _check_size(info, limits, frames=len(packets.pts))
    pts = np.sort(np.asarray(packets.pts, np.int64))
    if np.any(np.diff(pts) <= 0):
        raise MediaError("bad_timestamps", "two frames have the same presentation time")
    if info.container == "matroska":
        _check_gaps(pts, float(time_base))
    return Timeline(info, time_base, pts, np.sort(np.asarray(packets.keyframes, np.int64)))


def indexed_timeline(stream: Any) -> Timeline | None:
    """The timeline from the container's own index, without reading packets; None where that does not tell it.

    It does where pictures are stored in the order in which they are shown, as in the videos of our shards.
    """
    info = _describe(stream)
    entries = stream.index_entries
    if info.container != "mov" or stream.codec_context.has_b_frames or len(entries) != info.declared_frames:
        return None
    rows = [(entry.timestamp, entry.is_keyframe, entry.is_discard) for entry in entries]
    pts = np.asarray([row[0] for row in rows], np.int64)
    if any(row[2] for row in rows) or np.any(np.diff(pts) <= 0):
        return None
    keyframes = pts[np.asarray([row[1] for row in rows], bool)]
    return Timeline(info, Fraction(stream.time_base), pts, keyframes)


@contextlib.contextmanager
def open_video(source: Source, *, limits: VideoLimits = DEFAULT_LIMITS) -> Iterator[tuple[Any, Any]]:
    """(libav container, its first video stream), single-threaded; libav's errors leave the block as `MediaError`."""
    _check_signature(source)
    opened = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source.absolute()}"
    guards = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS, "max_streams": str(MAX_STREAMS)}
    # `options` also reaches the decoders that libav starts to complete the header.
    options = {"threads": "1", "max_pixels": str(limits.max_frame_pixels)}
    try:
        container = av.open(opened, options=options, container_options=guards)
    except MemoryError:
        raise MediaError("too_large", f"the header asks for too much: at most {MAX_STREAMS} streams are read") from None
    except (av.FFmpegError, ValueError) as error:
        raise MediaError("truncated", f"the container's header cannot be read: {reason_of(error)}") from None
    with container:
        stream = _video_stream(container)
        _check_size(_describe(stream), limits, frames=1)
        stream.codec_context.thread_count = 1
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise MediaError("decode_error", reason_of(error)) from None


def reason_of(error: Exception) -> str:
    """libav's words without the path: records must not depend on where a file lies."""
    return str(getattr(error, "strerror", "") or type(error).__name__)


def fit(width: int, height: int, short_side: int | None, *, even: bool = False) -> tuple[int, int]:
    """(width, height) with the given short side and both even; None keeps the size (made even on request)."""
    if short_side is None:
        return (width - width % 2, height - height % 2) if even else (width, height)
    scale = Fraction(short_side, min(width, height))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


@dataclass
class _Packets:
    pts: array[int]
    keyframes: array[int]
    read: int = 0  # of all streams
    read_bytes: int = 0
    stored: int = 0  # including those an edit list hides
    end_s: float = 0.0  # over all streams
    video_end: int = 0


def _check_signature(source: Source) -> None:
    if isinstance(source, bytes):
        head, size = source[:HEAD_BYTES], len(source)
    else:
        try:
            with source.open("rb") as stream:
                head = stream.read(HEAD_BYTES)
            size = source.stat().st_size
        except OSError as error:
            raise MediaError("unreadable", f"the file cannot be read: {error.strerror}") from None
    if size == 0:
        raise MediaError("empty", "the file has zero bytes")
    known = (
        head[4:8] in _MOV_BOXES or head[:4] == b"\x1a\x45\xdf\xa3" or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
    )
    if known:
        return
    if _refers_elsewhere(head):
        raise MediaError("hostile_container", f"it is a list, script or subtitle that names others: {head[:8]!r}")
    raise MediaError("not_video", f"its first bytes {head[:8]!r} are those of no container on the list")


def _refers_elsewhere(head: bytes) -> bool:
    """Whether the content is text that would send a decoder to other files: playlist, script, session, subtitle."""
    wide = head[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = head.decode("utf-16" if wide else "utf-8", errors="replace").lstrip("\ufeff\0 \t\r\n").lower()
    return bool(_REFERRING.match(text) or (text.startswith("<?xml") and _REFERRING_XML.search(text)))


def _video_stream(container: Any) -> Any:
    if len(container.streams) > MAX_STREAMS:
        raise MediaError("too_large", f"{len(container.streams)} streams, at most {MAX_STREAMS} are read")
    # Cover pictures are video streams of one frame; a real one comes first in practice, but need not.
    videos = [stream for stream in container.streams.video if not int(stream.disposition) & 0x400]
    if not videos:
        raise MediaError("no_video_stream", f"none of its {len(container.streams)} streams is video")
    return videos[0]


def _describe(stream: Any) -> VideoInfo:
    if stream.codec_context is None:
        raise MediaError("no_video_stream", "there is no decoder for its codec")
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not MIN_FPS <= rate <= MAX_FPS:
        raise MediaError("bad_timestamps", f"the frame rate is {rate}, not within {MIN_FPS}..{MAX_FPS}")
    if stream.width <= 0 or stream.height <= 0:
        raise MediaError("truncated", "the header gives no picture size")
    duration = stream.container.duration
    return VideoInfo(
        container=stream.container.format.name.partition(",")[0],
        codec=stream.codec_context.name,
        width=stream.width,
        height=stream.height,
        fps=float(rate),
        declared_frames=stream.frames or None,
        duration_s=duration / av.time_base if duration else None,
    )


def _check_size(info: VideoInfo, limits: VideoLimits, *, frames: int) -> None:
    pixels = info.width * info.height
    if pixels > limits.max_frame_pixels:
        raise MediaError("too_large", f"{info.width}x{info.height} is above {limits.max_frame_pixels} pixels a frame")
    if pixels * frames > limits.max_video_pixels:
        raise MediaError("too_large", f"{frames} frames of {info.width}x{info.height} are above the pixel limit")


def _read_packets(container: Any, stream: Any) -> _Packets:
    found = _Packets(array("q"), array("q"))
    # Compressed headers add little; beyond that, an index names the same bytes again and again.
    most_bytes = (1 << 20) + 4 * container.size
    for packet in container.demux():
        if packet.size == 0:
            continue  # the flush packet at the end, or a dropped frame in AVI
        found.read += 1
        found.read_bytes += packet.size
        if found.read > MAX_TINY_PACKETS and found.read_bytes < MIN_PACKET_BYTES * found.read:
            raise MediaError("too_large", f"more than {MAX_TINY_PACKETS} packets have {MIN_PACKET_BYTES} bytes or less")
        if found.read_bytes > most_bytes:
            raise MediaError("too_large", f"its packets add up to more than {most_bytes} bytes, several times the file")
        start = packet.pts if packet.pts is not None else packet.dts
        if packet.is_corrupt:
            raise MediaError("truncated", f"the packet after {found.stored} frames is cut short")
        if start is None:
            raise MediaError("bad_timestamps", f"the packet after {found.stored} frames has no time")
        end = start + (packet.duration or 0)
        if packet.stream is not stream:
            found.end_s = max(found.end_s, float(end * packet.time_base))
            continue
        found.stored += 1
        found.video_end = max(found.video_end, end)
        if _is_invisible(packet, stream):
            continue
        found.end_s = max(found.end_s, float(end * packet.time_base))
        if packet.is_discard:
            continue
        found.pts.append(start)
        if packet.is_keyframe:
            found.keyframes.append(start)
    return found


def _is_invisible(packet: Any, stream: Any) -> bool:
    """VP8 stores reference pictures that are never shown as packets of their own; bit 4 of byte 0 says so."""
    return stream.codec_context.name.startswith("vp8") and not bytes(packet)[0] & 0x10


def _check_complete(packets: _Packets, info: VideoInfo, stream: Any) -> None:
    """Every declared frame has its packet; where an edit list hides some, the stored ones reach the declared end."""
    tolerance_s = 1.5 / info.fps
    if info.declared_frames and packets.stored < info.declared_frames:
        end = (stream.start_time or 0) + (stream.duration or 0)
        reaches_end = stream.duration and (end - packets.video_end) * float(stream.time_base) <= tolerance_s / 3
        if not (_has_edit_list(info, stream) and reaches_end):
            raise MediaError("truncated", f"{packets.stored} of {info.declared_frames} declared frames are stored")
    if info.container == "matroska" and info.duration_s:
        start_s = (stream.container.start_time or 0) / av.time_base
        if packets.end_s < start_s + info.duration_s - tolerance_s / 2:
            raise MediaError(
                "truncated", f"the streams end at {packets.end_s:.2f} s of {info.duration_s:.2f} declared seconds"
            )


def _check_gaps(pts: npt.NDArray[np.int64], time_base: float) -> None:
    """WebM declares no number of frames; but where all frames but a few keep one exact distance, those few are lost.

    Recordings of variable rate, whose distances scatter, are not judged.
    """
    distances = np.diff(pts) * time_base
    if len(distances) < MIN_REGULAR:
        return
    usual = float(np.median(distances))
    odd = np.flatnonzero(np.abs(distances - usual) > MATROSKA_TICK_S + time_base)
    if 0 < len(odd) <= MAX_GAPS and np.all(distances[odd] > 1.5 * usual):
        raise MediaError("short_decode", f"frames are missing after frame {int(odd[0])}: the even frame times jump")


def _has_edit_list(info: VideoInfo, stream: Any) -> bool:
    """libav shortens a stream's duration to its edit list, but leaves the number of frames as stored."""
    if info.container != "mov" or not info.declared_frames or not stream.duration:
        return False
    return bool(info.declared_frames / info.fps - float(stream.duration * stream.time_base) > 1.5 / info.fps)
