"""Stored pictures and videos as they lie in the shards: whole JPEGs, and any range of bytes of an mp4."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from evaluation.view.api import Api, NotFoundError
from infra.errors import InputError

RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
CHUNK_BYTES = 1 << 18


class UnsatisfiableError(InputError):
    """A range that begins after the last byte."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"the video has {num_bytes} bytes.")
        self.num_bytes = num_bytes


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` (half-open) of `num_bytes`; `is_part` when the client asked for a range."""

    start: int
    end: int
    num_bytes: int
    is_part: bool


def parse_range(header: str, num_bytes: int) -> Span:
    """One range as RFC 9110 has it; anything else (several, other units) means the whole, which it allows."""
    match = RANGE.fullmatch(header.strip())
    if match is None or match.group(1) == match.group(2) == "":
        return Span(0, num_bytes, num_bytes, is_part=False)
    first, last = match.groups()
    if not first:  # the last so many bytes
        start, end = max(0, num_bytes - int(last)), num_bytes
    else:
        start, end = int(first), min(int(last) + 1, num_bytes) if last else num_bytes
        if last and int(last) < start:
            return Span(0, num_bytes, num_bytes, is_part=False)
    if start >= num_bytes:
        raise UnsatisfiableError(num_bytes)
    return Span(start, end, num_bytes, is_part=True)


def jpeg(api: Api, name: str, camera: str, index: str) -> bytes:
    """One stored frame."""
    row = api.find(name)
    if camera not in row.cameras or not (index.isascii() and index.isdigit() and len(index) < 10):
        raise NotFoundError(f"Clip {row.key} has no frame {index!r} of a camera {camera!r}.")
    with api.lock:
        return api.data.jpegs(row.number, [int(index)], camera)[0]


def video(api: Api, name: str, camera: str, header: str) -> tuple[Span, Iterator[bytes]]:
    """What a Range header asks of a stored mp4, and those bytes in pieces."""
    row = api.find(name)
    if camera not in row.cameras:
        raise NotFoundError(f"Clip {row.key} has no camera {camera!r}.")
    with api.lock:
        span = parse_range(header, api.data.video_num_bytes(row.number, camera))
    return span, _pieces(api, row.number, camera, span)


def _pieces(api: Api, number: int, camera: str, span: Span) -> Iterator[bytes]:
    for start in range(span.start, span.end, CHUNK_BYTES):
        num_bytes = min(CHUNK_BYTES, span.end - start)
        with api.lock:  # released while the browser takes the piece
            piece = api.data.video(number, camera, start=start, num_bytes=num_bytes)
        yield piece
