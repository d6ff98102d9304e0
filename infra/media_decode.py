"""Decoding in process with PyAV, one thread: planes for the encoders, RGB for readers.

A span is a half-open range of frame indices of the source. Every decode is held against the packets: a video that
gives fewer frames than it stores ends as `short_decode`, never as a shorter video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from infra.media import (
    DEFAULT_LIMITS,
    MediaError,
    Source,
    Timeline,
    VideoLimits,
    indexed_timeline,
    open_video,
    reason_of,
    scan,
)

Image = npt.NDArray[np.uint8]
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND  # bicubic as in the papers' preparation
# Exact arithmetic: libav's quick tables are 1 level darker, and a policy that learned from those pictures fails on
# rendered ones (docs/log.md).
TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class Planes:
    """One 4:2:0 picture, BT.601: Y (H, W), U and V (ceil(H/2), ceil(W/2)), uint8.

    `frame` is a libav frame of the same content, where there is one: an encoder takes it without copying.
    """

    y: Image
    u: Image
    v: Image
    frame_number: int  # in the source
    frame: Any = None


def decode_planes(
    source: Source,
    timeline: Timeline,
    *,
    size: Callable[[int, int], tuple[int, int]],
    full_range: bool,
    span: tuple[int, int] | None = None,
    stride: int = 1,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> Iterator[Planes]:
    """The frames `span[0], span[0] + stride, ...` as upright pictures, all of one size.

    `size` maps the (width, height) of the first one to that. `full_range` is what JPEG stores; video uses the limited
    one. Raises `MediaError`.
    """
    scaler = VideoReformatter()
    colour_range = ColorRange.JPEG if full_range else ColorRange.MPEG
    wanted: tuple[int, int] | None = None
    for number, frame in decode_span(source, timeline, span=span, limits=limits):
        if (number - (span[0] if span else 0)) % stride:
            continue
        turns = _quarter_turns(frame)
        wanted = wanted or size(*_upright(frame, turns))
        width, height = wanted if turns % 2 == 0 else wanted[::-1]
        scaled = scaler.reformat(
            frame,
            width=width,
            height=height,
            format="yuv420p",
            interpolation=SCALING,
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=colour_range,
            threads=1,
        )
        y, u, v = (_plane(plane, turns) for plane in scaled.planes)
        # A source that needs no conversion comes through as it is, side data and all: those are not handed on.
        yield Planes(y, u, v, number, None if turns or scaled is frame else scaled)


def decode_span(
    source: Source, timeline: Timeline, *, span: tuple[int, int] | None = None, limits: VideoLimits = DEFAULT_LIMITS
) -> Iterator[tuple[int, Any]]:
    """(frame number, libav frame) for every frame of the span, each exactly once and in order.

    Raises `MediaError`: `short_decode` if the decoder gives fewer, `bad_timestamps` if it gives others.
    """
    first, end = span or (0, timeline.num_frames)
    with open_video(source, limits=limits) as (container, stream):
        yield from _span(_Opened(source, container, stream, timeline, limits), first, end)


def upright_size(source: Source, *, limits: VideoLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(width, height) as shown: a camera's rotation flag swaps them. Decodes one frame."""
    with open_video(source, limits=limits) as (container, stream):
        for frame in container.decode(stream):
            return _upright(frame, _quarter_turns(frame))
    raise MediaError("short_decode", "no frame was decoded")


def decode_video(source: Source, indices: Sequence[int] | None = None) -> Image:
    """(N, H, W, 3) RGB of the frames `indices` (any order, repeats allowed) or of all; seeks to what is needed.

    Raises `MediaError`; an index outside the video is a `short_decode`.
    """
    with open_video(source) as (container, stream):
        timeline = indexed_timeline(stream) or scan(source)
        count = timeline.num_frames
        wanted = list(range(count)) if indices is None else [int(index) for index in indices]
        if not wanted:
            return np.empty((0, timeline.info.height, timeline.info.width, 3), np.uint8)
        if not 0 <= min(wanted) <= max(wanted) < count:
            raise MediaError("short_decode", f"frames {wanted} asked of a video of {count}")
        found: dict[int, Image] = {}
        for run in _runs(sorted(set(wanted)), timeline):
            chosen = set(run)
            for number, frame in _span(_Opened(source, container, stream, timeline), run[0], run[-1] + 1):
                if number in chosen:
                    found[number] = rgb_of(frame)
    return np.stack([found[number] for number in wanted])


def rgb_of(frame: Any) -> Image:
    """(H, W, 3) uint8 of a libav frame, upright."""
    rgb = VideoReformatter().reformat(
        frame, format="rgb24", interpolation=TO_RGB, dst_color_range=ColorRange.JPEG, threads=1
    )
    return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), _quarter_turns(frame)))


def _runs(numbers: list[int], timeline: Timeline) -> list[list[int]]:
    """Split where a seek skips frames: a run goes on while no keyframe lies between two wanted frames."""
    keyframes = np.searchsorted(timeline.pts, timeline.keyframes)
    groups = np.searchsorted(keyframes, numbers, side="right")
    runs: list[list[int]] = []
    for position, number in enumerate(numbers):
        if position and groups[position] - groups[position - 1] <= 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


@dataclass(frozen=True)
class _Opened:
    """A container in use."""

    source: Source
    container: Any
    stream: Any
    timeline: Timeline
    limits: VideoLimits = DEFAULT_LIMITS


def _span(opened: _Opened, first: int, end: int) -> Iterator[tuple[int, Any]]:
    """`decode_span` in an open container; spans that ascend may follow one another."""
    timeline, limits = opened.timeline, opened.limits
    number, expected = first, timeline.pts[first:end]
    for frame in _frames_from(opened, first):
        wanted = int(expected[number - first])
        stamp = _stamp(frame, number, timeline, whole=first == 0)
        if stamp < wanted and number == first:
            continue  # between the keyframe and the span
        if stamp != wanted:
            late = stamp > wanted
            reason = "short_decode" if late else "bad_timestamps"
            raise MediaError(reason, f"frame {number} {'was not decoded' if late else 'goes back in time'}")
        if frame.is_corrupt:
            raise MediaError("decode_error", f"the decoder marks frame {number} as corrupt")
        if frame.width * frame.height > limits.max_frame_pixels:
            raise MediaError("too_large", f"frame {number} is {frame.width}x{frame.height}")
        yield number, frame
        number += 1
        if number == end:
            return
    raise MediaError("short_decode", f"{number - first} of {len(expected)} stored frames were decoded")


def diagnose(source: Source, timeline: Timeline, problem: str, *, limits: VideoLimits = DEFAULT_LIMITS) -> MediaError:
    """What a decoder's complaint amounts to: pictures that are missing (`short_decode`), or damaged ones.

    Decodes once more, past every error, and counts what comes out.
    """
    count = 0
    with open_video(source, limits=limits) as (container, stream):
        for packet in container.demux(stream):
            try:
                count += len(packet.decode())
            except av.FFmpegError:
                continue
    if count < timeline.num_frames:
        return MediaError("short_decode", f"{count} of {timeline.num_frames} stored frames can be decoded: {problem}")
    return MediaError("decode_error", problem)


def _frames_from(opened: _Opened, first: int) -> Iterator[Any]:
    """Decoded frames from the last keyframe at or before frame `first` on."""
    container, stream, timeline = opened.container, opened.stream, opened.timeline
    target = int(timeline.pts[first])
    if not stream.codec_context.is_open:
        # Damage inside a picture is an error, not a smear that training would learn.
        stream.codec_context.options = {"err_detect": "explode"}
    if first:
        before = timeline.keyframes[timeline.keyframes <= target]
        if len(before) and before[-1] > timeline.pts[0]:
            container.seek(int(before[-1]), stream=stream, backward=True, any_frame=False)
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError as error:
            # After a seek, pictures before an open group's keyframe lack their references; none of them is wanted.
            if packet.pts is None or packet.pts >= target:
                raise diagnose(opened.source, timeline, reason_of(error), limits=opened.limits) from None


def _stamp(frame: Any, number: int, timeline: Timeline, *, whole: bool) -> int:
    """The frame's time. AVI stores decode times only: there, a decode from the start counts."""
    if timeline.info.container == "avi" and whole:
        return int(timeline.pts[number]) if number < timeline.num_frames else int(timeline.pts[-1]) + 1
    stamp = frame.pts if frame.pts is not None else frame.dts
    if stamp is None:
        raise MediaError("bad_timestamps", f"frame {number} has no time")
    return int(stamp)


def _quarter_turns(frame: Any) -> int:
    """Counter-clockwise quarter turns that put the picture upright."""
    return round((frame.rotation or 0) / 90) % 4


def _upright(frame: Any, turns: int) -> tuple[int, int]:
    return (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)


def _plane(plane: Any, turns: int) -> Image:
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
    return np.ascontiguousarray(np.rot90(rows, turns))
