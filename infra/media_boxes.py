"""What an mp4 or mov file declares of its frames, read from its boxes: libav reports it only after its own edits.

A file that says one thing in its track header and another in its table of frame times is damaged or made to mislead:
players would show its few frames for hours, or hide most of them behind an edit list.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

MAX_BOXES = 4096  # children of one box; ordinary files have a dozen
MAX_TABLE_BYTES = 16 << 20  # 2 million different frame times
# Writers round, and give the last frame any duration: what is below these is no contradiction.
TOLERANCE_S, TOLERANCE_SHARE = 1.0, 0.01
MAX_REORDER = 32  # frames; codecs hold back 16
_UNKNOWN = {0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}
_EMPTY_EDIT = -1


@dataclass(frozen=True)
class TrackTimes:
    """One track, in seconds. `declared_s` None where the header does not tell; `frames_s` is the sum of frame times.

    One frame has no length of its own: what a header says of it goes.
    """

    track_id: int
    declared_s: float | None
    frames_s: float
    shortest_frame_s: float
    longest_frame_s: float
    reorder_s: float = 0.0  # range of the shifts from decode to presentation times, and the largest
    latest_shift_s: float = 0.0
    elsewhere: bool = False  # the frames are said to be in another file
    edits: tuple[tuple[float, float], ...] = ()  # (start in the media or negative if nothing is shown, duration)


@dataclass(frozen=True)
class MovieTimes:
    """The whole file; None for the movie where its header does not tell."""

    movie_s: float | None
    tracks: tuple[TrackTimes, ...]


def find_contradiction(source: Path | bytes, track_id: int, *, hidden_frames: int = 0) -> tuple[str, str] | None:
    """(reason, message) if a track's boxes say what cannot be; None also where they do not tell.

    `hidden_frames` is how many stored frames libav leaves out because of an edit list.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        try:
            movie = _read_movie(stream)
        except (struct.error, ValueError, OverflowError, ZeroDivisionError, IndexError):
            return None  # libav has read it, so its own checks must do
    tracks = [track for track in movie.tracks if track.track_id == track_id] if movie else []
    if movie is None or len(tracks) != 1:
        return None
    track = tracks[0]
    if track.elsewhere:
        return "hostile_container", "it says that its frames lie in another file"
    if track.reorder_s > MAX_REORDER * track.longest_frame_s:
        return "bad_timestamps", f"a frame is shown {track.reorder_s:.2f} s from its place in the file"
    if track.declared_s is None:
        return None
    problem = _wrong_length(track) or _wrong_edits(track, hidden_frames)
    longest = max(max(other.frames_s, sum(edit[1] for edit in other.edits)) for other in movie.tracks)
    if not problem and movie.movie_s is not None and _exceeds(movie.movie_s, longest, track.longest_frame_s):
        problem = f"the file declares {movie.movie_s:.2f} s, its longest track takes {longest:.2f} s"
    return ("wrong_duration", problem) if problem else None


def _wrong_length(track: TrackTimes) -> str:
    declared_s, frames_s = track.declared_s or 0.0, track.frames_s
    if _exceeds(max(declared_s, frames_s), min(declared_s, frames_s), track.longest_frame_s):
        return f"its header declares {declared_s:.2f} s, its frames take {frames_s:.2f} s"
    return ""


def _wrong_edits(track: TrackTimes, hidden_frames: int) -> str:
    for start_s, duration_s in track.edits:
        if start_s < 0:
            continue
        end_s = track.frames_s + track.latest_shift_s
        if _exceeds(duration_s, end_s, track.longest_frame_s):
            return f"its edit list shows {duration_s:.2f} s of {track.frames_s:.2f} s of frames"
        if hidden_frames and start_s + duration_s > end_s + 1.5 * track.longest_frame_s:
            return f"its edit list hides {hidden_frames} frames, yet ends after the last"
        if hidden_frames and duration_s < 0.9 * track.shortest_frame_s:
            return f"its edit list shows {duration_s:.3f} s, which is less than a frame"
    return ""


def _exceeds(longer_s: float, shorter_s: float, longest_frame_s: float) -> bool:
    # The last frame's duration is anybody's guess: a slide show may leave it out.
    return longer_s - shorter_s > max(TOLERANCE_S, min(longest_frame_s, shorter_s), TOLERANCE_SHARE * longer_s)


def _read_movie(stream: BinaryIO) -> MovieTimes | None:
    """None for a file in fragments, whose header knows nothing of them, and for one without a plain header."""
    end = stream.seek(0, io.SEEK_END)
    movie = next((place for kind, place in _boxes(stream, (0, end)) if kind == b"moov"), None)
    if movie is None:
        return None
    children = list(_boxes(stream, movie))
    kinds = {kind for kind, _ in children}
    if b"mvex" in kinds or b"mvhd" not in kinds:
        return None
    timescale, duration = _durations(stream, dict(children)[b"mvhd"])
    tracks = tuple(_read_track(stream, place, timescale) for kind, place in children if kind == b"trak")
    if not tracks or any(track is None for track in tracks):
        return None
    return MovieTimes(
        None if duration in _UNKNOWN else duration / timescale, tuple(track for track in tracks if track is not None)
    )


def _read_track(stream: BinaryIO, place: tuple[int, int], movie_timescale: int) -> TrackTimes | None:
    boxes = dict(_boxes(stream, place))
    media = dict(_boxes(stream, boxes[b"mdia"])) if b"mdia" in boxes else {}
    if b"tkhd" not in boxes or b"mdhd" not in media or b"minf" not in media:
        return None
    information = dict(_boxes(stream, media[b"minf"]))
    tables = dict(_boxes(stream, information[b"stbl"])) if b"stbl" in information else {}
    if b"stts" not in tables:
        return None
    head = _content(stream, boxes[b"tkhd"], 24)
    track_id = struct.unpack_from(">I", head, 20 if head[0] else 12)[0]
    timescale, declared = _durations(stream, media[b"mdhd"])
    times = _table(stream, tables[b"stts"], ">u4,>u4")
    counts, deltas = times["f0"].astype(np.float64), times["f1"].astype(">i4").astype(np.float64)
    shifts = _table(stream, tables[b"ctts"], ">u4,>i4")["f1"].astype(np.float64) if b"ctts" in tables else np.zeros(1)
    edits: tuple[tuple[float, float], ...] = ()
    if b"edts" in boxes and (lists := dict(_boxes(stream, boxes[b"edts"]))) and b"elst" in lists:
        edits = _edits(stream, lists[b"elst"], movie_timescale, timescale)
    return TrackTimes(
        track_id,
        None if declared in _UNKNOWN or counts.sum() <= 1 else declared / timescale,
        float(counts @ deltas) / timescale,
        float(deltas.min(initial=deltas.max(initial=0))) / timescale,
        float(deltas.max(initial=0)) / timescale,
        float(np.ptp(shifts)) / timescale if len(shifts) else 0.0,
        float(shifts.max(initial=0)) / timescale,
        _lies_elsewhere(stream, information),
        edits,
    )


def _lies_elsewhere(stream: BinaryIO, information: dict[bytes, tuple[int, int]]) -> bool:
    """Whether a data reference names a place and does not say that it is this file."""
    references = dict(_boxes(stream, information[b"dinf"])).get(b"dref") if b"dinf" in information else None
    if references is None:
        return False
    for kind, place in _boxes(stream, (references[0] + 8, references[1])):
        flags = _content(stream, place, 4)
        if kind in (b"url ", b"urn ", b"alis", b"rsrc") and not flags[-1] & 1 and place[1] - place[0] > 5:
            return True
    return False


def _edits(
    stream: BinaryIO, place: tuple[int, int], movie_timescale: int, timescale: int
) -> tuple[tuple[float, float], ...]:
    version = _content(stream, place, 1)[0]
    rows = _table(stream, place, ">u8,>i8,>i4" if version else ">u4,>i4,>i4")
    found = []
    for duration, start, rate in rows.tolist():
        if rate == 1 << 16:  # a dwell or another speed shows less of the media than it lasts
            found.append((-1.0 if start == _EMPTY_EDIT else start / timescale, duration / movie_timescale))
        else:
            found.append((-1.0, duration / movie_timescale))
    return tuple(found)


def _durations(stream: BinaryIO, place: tuple[int, int]) -> tuple[int, int]:
    """(timescale, duration) of an mvhd or mdhd box."""
    head = _content(stream, place, 32)
    timescale, duration = struct.unpack_from(">IQ", head, 20) if head[0] else struct.unpack_from(">II", head, 12)
    return int(timescale), int(duration)


def _table(stream: BinaryIO, place: tuple[int, int], row: str) -> npt.NDArray[Any]:
    """The rows of a box that begins with version, flags and their number; not more than the box holds."""
    dtype = np.dtype(row)
    size = place[1] - place[0]
    if size > MAX_TABLE_BYTES:
        raise ValueError(f"a table of {size} bytes is not read")
    data = _content(stream, place, size)
    count = min(int.from_bytes(data[4:8], "big"), (size - 8) // dtype.itemsize)
    return np.frombuffer(data, dtype, count=max(0, count), offset=8)


def _content(stream: BinaryIO, place: tuple[int, int], size: int) -> bytes:
    stream.seek(place[0])
    return stream.read(min(size, place[1] - place[0]))


def _boxes(stream: BinaryIO, place: tuple[int, int]) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """(kind, place of its content) of the boxes side by side in a place; ends at the first that cannot be."""
    at, end = place
    for _ in range(MAX_BOXES):
        if at + 8 > end:
            return
        size, kind = struct.unpack(">I4s", _content(stream, (at, end), 8))
        start = at + 8
        if size == 1:
            size, start = int.from_bytes(_content(stream, (start, end), 8), "big"), start + 8
        stop = end if size == 0 else at + size
        if not start <= stop <= end:
            return
        yield kind, (start, stop)
        at = stop
