"""TFRecord files: each record is its length, the length's checksum, its content, and the content's checksum.

A record with a wrong checksum costs that record, a length with a wrong one the rest of the file: nothing says then
where the next record begins.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c

from infra.errors import InputError
from infra.storage import join, read_range, size_bytes

HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
AROUND = HEADER.size + FOOTER.size
MAX_RECORD_BYTES = (1 << 31) - 1  # what a protocol buffer may have
WINDOW_BYTES = 1 << 23
MASK = 0xA282EAD8
ADDRESS = re.compile(r"(?P<file>.+)#(?P<offset>\d{1,19})\+(?P<length>\d{1,19})(?::(?P<key>.+))?", re.DOTALL)


@dataclass(frozen=True)
class Record:
    """`offset` is where the record begins in its file, `length` that of its content; `problem` if that is damaged."""

    offset: int
    length: int
    content: bytes = b""
    problem: str = ""


def iterate_records(place: str) -> Iterator[Record]:
    """All records of a file or object, one in memory at a time; a damaged one has a `problem` and no content."""
    window = _Window(place)
    offset = 0
    while offset < window.size:
        left = window.size - offset
        if left < AROUND:
            yield Record(offset, 0, problem=f"the file is cut: it ends {left} bytes into a record")
            return
        length, checksum = HEADER.unpack(window.read(offset, HEADER.size))
        if _masked_crc(HEADER.pack(length, 0)[:8]) != checksum:
            yield Record(offset, 0, problem="a record's length is damaged, and with it the rest of the file")
            return
        if length > left - AROUND:
            have = f"has {left - AROUND} of the {length} bytes it says"
            yield Record(offset, 0, problem=f"the file is cut: the record {have}")
            return
        if length > MAX_RECORD_BYTES:
            yield Record(offset, length, problem=f"the record has {length} bytes, above {MAX_RECORD_BYTES}")
        else:
            yield _checked(offset, window.read(offset + HEADER.size, length + FOOTER.size))
        offset += length + AROUND


def record_address(file: str, record: Record, key: str = "") -> str:
    """`FILE#OFFSET+LENGTH`, or `FILE#OFFSET+LENGTH:KEY` for one feature of it."""
    return f"{file}#{record.offset}+{record.length}" + (f":{key}" if key else "")


def read_record(root: str, address: str) -> tuple[bytes, str]:
    """(content, key) of a record by its address. `InputError` unless it is there and whole."""
    match = ADDRESS.fullmatch(address)
    if match is None or int(match["length"]) > MAX_RECORD_BYTES:
        raise InputError(f"{address!r} is no address of a record.")
    place, offset, length = join(root, match["file"]), int(match["offset"]), int(match["length"])
    if size_bytes(place) < offset + length + AROUND:
        raise InputError(f"{address} is not there: the file is shorter.")
    data = read_range(place, offset, length + AROUND)
    if HEADER.unpack_from(data) != (length, _masked_crc(data[:8])):
        raise InputError(f"{address}: no record of that length begins there.")
    record = _checked(offset, data[HEADER.size :])
    if record.problem:
        raise InputError(f"{address}: {record.problem}.")
    return record.content, match["key"] or ""


class _Window:
    """Reads forward through a file, a stretch at a time."""

    def __init__(self, place: str) -> None:
        self.size = size_bytes(place)
        self._place, self._start, self._data = place, 0, b""

    def read(self, offset: int, length: int) -> bytes:
        if not self._start <= offset <= offset + length <= self._start + len(self._data):
            stretch = min(max(length, WINDOW_BYTES), self.size - offset)
            self._start, self._data = offset, b""  # not two of them at once
            self._data = read_range(self._place, offset, stretch)
        begin = offset - self._start
        return self._data[begin : begin + length]


def _checked(offset: int, data: bytes) -> Record:
    content, (checksum,) = data[: -FOOTER.size], FOOTER.unpack_from(data, len(data) - FOOTER.size)
    if _masked_crc(content) != checksum:
        return Record(offset, len(content), problem="the record is damaged: its checksum is another")
    return Record(offset, len(content), content)


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return int(((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF)
