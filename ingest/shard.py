"""Shards: plain POSIX ustar tars whose bytes are a function of their content, and the strict way to read them.

Headers are built directly (mtime 0, uid and gid 0, mode 0644, no names of owners), so the same samples give the same
sha256 on every machine. Nothing here extracts a tar: members are read as bytes, and only regular files with a plain
name `KEY.SUFFIX` exist.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from infra.digests import sha256_bytes
from infra.errors import DataError, InputError
from ingest.index import KEY_PATTERN, SUFFIX_PATTERN, TAR_BLOCK, MemberEntry, SampleEntry, encode_index

NAME_BYTES = 100
MAX_MEMBER_BYTES = 2**32 - 1  # u32 in the index
END_OF_TAR = bytes(2 * TAR_BLOCK)
OCTAL_SIZE = re.compile(rb"[0-7]{11}\0")
WRITE_BUFFER_BYTES = 1 << 20

# Fields after the name: mode, uid, gid | size | mtime | checksum as spaces, type '0', no link, magic, no owner names.
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" * 2
_AFTER_SIZE = b"00000000000\0"
_AFTER_CHECKSUM = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
_CONSTANT_SUM = sum(_BEFORE_SIZE) + sum(_AFTER_SIZE) + 8 * ord(" ") + sum(_AFTER_CHECKSUM)


class Member(NamedTuple):
    """One file of a sample: `suffix` without leading dot, e.g. "json", "f000042.jpg", "corner4.mp4"."""

    suffix: str
    data: bytes
    source_frame: int = -1  # of a JPEG: the frame number in the source video


class StoredMember(NamedTuple):
    """One member as `iter_members` finds it; `offset` is that of the content."""

    key: str
    suffix: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class ShardSummary:
    """What the receipt records of a finished shard."""

    tar_sha256: str
    idx_sha256: str
    tar_bytes: int
    num_samples: int
    num_members: int


def index_path(tar: Path) -> Path:
    """`shard-00042.tar` -> `shard-00042.idx` beside it."""
    return tar.with_suffix(".idx")


class ShardWriter:
    """Writes one tar and, on `close`, the index beside it. The caller gives a temporary path and publishes both.

    As a context manager it closes on success and removes both files when the block raises; `summary` is set by close.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".tar":
            raise InputError(f"shard path {path} does not end in .tar.", remedy="The index is named after it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.summary: ShardSummary | None = None
        self._stream: BinaryIO = path.open("wb", buffering=WRITE_BUFFER_BYTES)
        self._hash = hashlib.sha256()
        self._offset = 0
        self._samples: list[SampleEntry] = []
        self._keys: set[str] = set()

    def add(self, key: str, members: Sequence[Member]) -> None:
        """Append one sample; raises `DataError` for a bad or repeated name and writes nothing of it then."""
        self._check(key, members)
        entries = []
        for member in members:
            name = f"{key}.{member.suffix}".encode("ascii")
            self._write(tar_header(name, len(member.data)))
            entries.append(MemberEntry(member.suffix, self._offset, len(member.data), member.source_frame))
            self._write(member.data)
            if padding := -len(member.data) % TAR_BLOCK:
                self._write(bytes(padding))
        self._keys.add(key)
        self._samples.append(SampleEntry(key, tuple(entries)))

    def _check(self, key: str, members: Sequence[Member]) -> None:
        if not KEY_PATTERN.fullmatch(key):
            raise DataError(f"sample key {key!r} is not allowed.", remedy=f"It must match {KEY_PATTERN.pattern}.")
        if key in self._keys:
            raise DataError(f"sample key {key!r} was added to {self.path.name} before.", remedy="Keys are unique.")
        if not members:
            raise DataError(f"sample {key!r} has no members.", remedy="A sample without content is a failure record.")
        seen: set[str] = set()
        for suffix, data, _ in members:
            if not SUFFIX_PATTERN.fullmatch(suffix) or suffix in seen:
                raise DataError(f"member {key}.{suffix} is repeated or not one of json, jpg, mp4, txt, npz, npy.")
            seen.add(suffix)
            if len(key) + 1 + len(suffix) > NAME_BYTES or len(data) > MAX_MEMBER_BYTES:
                raise DataError(
                    f"member {key}.{suffix} of {len(data)} bytes is too long for a shard.",
                    remedy=f"Names have at most {NAME_BYTES} bytes, members at most {MAX_MEMBER_BYTES}.",
                )

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self._offset += len(data)

    def close(self) -> ShardSummary:
        """Finish the tar, write the index, sync both to disk."""
        if self.summary is not None:
            return self.summary
        self._write(END_OF_TAR)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        tar_sha256 = self._hash.hexdigest()
        index = encode_index(self._samples, tar_sha256=tar_sha256, tar_bytes=self._offset)
        with index_path(self.path).open("wb") as stream:
            stream.write(index)
            stream.flush()
            os.fsync(stream.fileno())
        num_members = sum(len(sample.members) for sample in self._samples)
        self.summary = ShardSummary(
            tar_sha256, sha256_bytes(index), self._offset, num_samples=len(self._samples), num_members=num_members
        )
        return self.summary

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._stream.close()
        self.path.unlink(missing_ok=True)
        index_path(self.path).unlink(missing_ok=True)


def tar_header(name: bytes, size: int) -> bytes:
    """The 512-byte ustar header of a regular file with the constants this project uses."""
    name_field, size_field = name.ljust(NAME_BYTES, b"\0"), b"%011o\0" % size
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(name) + sum(size_field))
    return name_field + _BEFORE_SIZE + size_field + _AFTER_SIZE + checksum + _AFTER_CHECKSUM


def iter_members(path: Path) -> Iterator[StoredMember]:
    """Every member of a shard, in order, each byte of the tar accounted for.

    Raises `DataError` unless every header is exactly the one `ShardWriter` gives for its name and size (so no links,
    devices, long names or owners), keys are contiguous and names unique, padding is zero, and the file ends right
    after the two end blocks: a tar cut at any place is refused, also between two members.
    """
    finished: set[str] = set()
    current, suffixes = "", set[str]()
    with path.open("rb", buffering=WRITE_BUFFER_BYTES) as stream:
        while True:
            header_offset = stream.tell()
            header = stream.read(TAR_BLOCK)
            if header == END_OF_TAR[:TAR_BLOCK]:
                if stream.read() != END_OF_TAR[TAR_BLOCK:]:
                    raise _damaged(path, header_offset, "it does not end with exactly two empty blocks")
                return
            key, suffix, size = _parse_header(header, path, header_offset)
            if key != current:
                finished.add(current)
                current, suffixes = key, set()
            if key in finished or suffix in suffixes:
                raise _damaged(path, header_offset, f"{key}.{suffix} appears twice")
            suffixes.add(suffix)
            data, padding = stream.read(size), stream.read(-size % TAR_BLOCK)
            if len(data) != size or padding != bytes(-size % TAR_BLOCK):
                raise _damaged(path, header_offset, f"{key}.{suffix} is cut short or badly padded")
            yield StoredMember(key, suffix, header_offset + TAR_BLOCK, data)


def _parse_header(header: bytes, path: Path, offset: int) -> tuple[str, str, int]:
    if len(header) != TAR_BLOCK:
        raise _damaged(path, offset, f"a header has {len(header)} of {TAR_BLOCK} bytes")
    name, size_field = header[:NAME_BYTES].rstrip(b"\0"), header[124:136]
    key, _, suffix = name.decode("latin-1").partition(".")
    if not KEY_PATTERN.fullmatch(key) or not SUFFIX_PATTERN.fullmatch(suffix):
        raise _damaged(path, offset, f"name {name!r} is not allowed")
    if not OCTAL_SIZE.fullmatch(size_field):
        raise _damaged(path, offset, f"size field {size_field!r} is not octal")
    size = int(size_field[:11], 8)
    if header != tar_header(name, size):
        raise _damaged(path, offset, f"the header of {key}.{suffix} is not that of a plain regular file")
    return key, suffix, size


def _damaged(path: Path, offset: int, problem: str) -> DataError:
    return DataError(f"shard {path} at byte {offset}: {problem}.", remedy="Build the shard again from its plan.")
