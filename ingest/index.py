"""`shard-NNNNN.idx`: where every member of a shard's tar lies, small, fixed little-endian, mmap-able.

Byte layout, S samples, M members, X distinct suffixes (all integers little-endian, nothing between the parts):

    0        8s    magic b"FFSHIDX\\0"
    8        u32   version (1)
    12       u32   S
    16       u32   M
    20       u32   X
    24       u64   size of the tar in bytes
    32       u32   length of the text part in bytes
    36       u32   0
    40       32s   sha256 of the tar
    72       u64   [M]     offset of the member's content in the tar (a multiple of 512)
    +8M      u32   [M]     length of the content
    +4M      i32   [M]     source frame number of a JPEG, -1 for other members
    +4M      u32   [M]     suffix id
    +4M      u32   [S][4]  key start in the text, key length, first member, number of members
    +16S     u32   [X][2]  suffix start in the text, suffix length
    +8X      text  ASCII, keys and suffixes without separators

A file of any other length is refused. Columns rather than rows: each is an aligned array of its own when mapped.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from infra.errors import DataError

MAGIC = b"FFSHIDX\0"
VERSION = 1
HEADER = struct.Struct("<8sIIIIQII32s")
# No dot in a key: WebDataset readers cut the name at its first dot. No slash: nothing ever leaves its folder.
KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
SUFFIX_PATTERN = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9_-]*\.)*(?:json|jpg|mp4|txt|npz|npy)", re.ASCII)
TAR_BLOCK = 512
REMEDY = "Build the shard again from its plan."


@dataclass(frozen=True)
class MemberEntry:
    """One member as the writer knows it: content at `offset`, `length` bytes long."""

    suffix: str
    offset: int
    length: int
    source_frame: int = -1


@dataclass(frozen=True)
class SampleEntry:
    """One sample: its key and its members in tar order."""

    key: str
    members: tuple[MemberEntry, ...]


def encode_index(samples: list[SampleEntry], *, tar_sha256: str, tar_bytes: int) -> bytes:
    """The bytes of an index file; a pure function of its arguments."""
    suffixes: dict[str, int] = {}
    text: list[str] = []
    sample_rows: list[tuple[int, int, int, int]] = []
    columns: list[tuple[int, int, int, int]] = []
    start = 0
    for sample in samples:
        sample_rows.append((start, len(sample.key), len(columns), len(sample.members)))
        text.append(sample.key)
        start += len(sample.key)
        for member in sample.members:
            suffix_id = suffixes.setdefault(member.suffix, len(suffixes))
            columns.append((member.offset, member.length, member.source_frame, suffix_id))
    suffix_rows = []
    for suffix in suffixes:
        suffix_rows.append((start, len(suffix)))
        text.append(suffix)
        start += len(suffix)
    offsets, lengths, frames, suffix_ids = zip(*columns, strict=True) if columns else ((), (), (), ())
    parts = [
        HEADER.pack(
            MAGIC, VERSION, len(samples), len(columns), len(suffixes), tar_bytes, start, 0, bytes.fromhex(tar_sha256)
        ),
        np.asarray(offsets, "<u8").tobytes(),
        np.asarray(lengths, "<u4").tobytes(),
        np.asarray(frames, "<i4").tobytes(),
        np.asarray(suffix_ids, "<u4").tobytes(),
        np.asarray(sample_rows, "<u4").tobytes(),
        np.asarray(suffix_rows, "<u4").tobytes(),
        "".join(text).encode("ascii"),
    ]
    return b"".join(parts)


class ShardIndex:
    """A validated index, mapped from disk. Raises `DataError` for anything that is not exactly the documented layout.

    `offsets`, `lengths`, `source_frames` and `suffix_ids` are the (M,) columns; members of sample i are the slice
    `members_of(i)`.
    """

    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint32]
    source_frames: npt.NDArray[np.int32]
    suffix_ids: npt.NDArray[np.uint32]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if size < HEADER.size:
                raise self._wrong(f"{size} bytes are fewer than the header's {HEADER.size}")
            raw: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except FileNotFoundError:
            raise DataError(f"index {path} does not exist.", remedy=REMEDY) from None
        self._read_header(raw)
        self._map_columns(raw)
        self._check_members()
        self._check_samples()

    def _wrong(self, problem: str) -> DataError:
        return DataError(f"index {self.path} is not valid: {problem}.", remedy=REMEDY)

    def _read_header(self, raw: npt.NDArray[np.uint8]) -> None:
        fields = HEADER.unpack(raw[: HEADER.size].tobytes())
        magic, version, self.num_samples, self.num_members, self._num_suffixes = fields[:5]
        self.tar_bytes, self._text_bytes, reserved, digest = fields[5:]
        self.tar_sha256: str = digest.hex()
        if magic != MAGIC:
            raise self._wrong(f"it starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION or reserved != 0:
            raise self._wrong(f"version {version} is not {VERSION}")
        expected = HEADER.size + 20 * self.num_members + 16 * self.num_samples + 8 * self._num_suffixes
        if len(raw) != expected + self._text_bytes:
            raise self._wrong(f"{len(raw)} bytes where its counts need {expected + self._text_bytes}")

    def _map_columns(self, raw: npt.NDArray[np.uint8]) -> None:
        cursor = HEADER.size

        def take(dtype: str, count: int) -> npt.NDArray[np.generic]:
            nonlocal cursor
            num_bytes = np.dtype(dtype).itemsize * count
            column = np.asarray(raw[cursor : cursor + num_bytes]).view(dtype)
            cursor += num_bytes
            return column

        self.offsets = take("<u8", self.num_members)  # type: ignore[assignment]
        self.lengths = take("<u4", self.num_members)  # type: ignore[assignment]
        self.source_frames = take("<i4", self.num_members)  # type: ignore[assignment]
        self.suffix_ids = take("<u4", self.num_members)  # type: ignore[assignment]
        samples = take("<u4", 4 * self.num_samples).reshape(-1, 4).astype(np.int64)
        suffixes = take("<u4", 2 * self._num_suffixes).reshape(-1, 2).astype(np.int64)
        try:
            text = raw[cursor:].tobytes().decode("ascii")
        except UnicodeDecodeError:
            raise self._wrong("its names are not ASCII") from None
        self._first, self._count = samples[:, 2].copy(), samples[:, 3].copy()
        self.keys = tuple(text[start : start + length] for start, length in samples[:, :2].tolist())
        self.suffixes = tuple(text[start : start + length] for start, length in suffixes.tolist())
        self._suffix_id = {suffix: number for number, suffix in enumerate(self.suffixes)}

    def _check_members(self) -> None:
        if len(self._suffix_id) != self._num_suffixes:
            raise self._wrong("a suffix is listed twice")
        for suffix in self.suffixes:
            if not SUFFIX_PATTERN.fullmatch(suffix):
                raise self._wrong(f"suffix {suffix!r} is not allowed (json, jpg, mp4, txt, npz, npy)")
        if not self.num_members:
            return
        if int(self.suffix_ids.max()) >= self._num_suffixes:
            raise self._wrong(f"suffix id {int(self.suffix_ids.max())} does not exist")
        if int(self.offsets.max()) > self.tar_bytes:  # before any addition, which could wrap around
            raise self._wrong(f"offset {int(self.offsets.max())} lies outside the tar's {self.tar_bytes} bytes")
        ends = self.offsets + self.lengths
        if int(ends.max()) > self.tar_bytes or int(self.offsets[0]) < TAR_BLOCK or np.any(self.offsets % TAR_BLOCK):
            raise self._wrong(f"a member lies outside the tar's {self.tar_bytes} bytes or off its blocks")
        if np.any(self.offsets[1:] < ends[:-1] + TAR_BLOCK):
            raise self._wrong("members overlap or are out of order")

    def _check_samples(self) -> None:
        if len(set(self.keys)) != self.num_samples:
            raise self._wrong("a key is listed twice")
        for key in self.keys:
            if not KEY_PATTERN.fullmatch(key):
                raise self._wrong(f"key {key!r} is not allowed")
        starts = np.cumsum(self._count) - self._count
        if int(self._count.sum()) != self.num_members or np.any(starts != self._first):
            raise self._wrong("its samples do not cover its members exactly")

    def members_of(self, sample: int) -> slice:
        """The rows of sample `sample` (0-based in this shard)."""
        first = int(self._first[sample])
        return slice(first, first + int(self._count[sample]))

    def find(self, sample: int, suffix: str) -> int | None:
        """The member row of `suffix` in a sample, None when it has no such member."""
        suffix_id = self._suffix_id.get(suffix)
        if suffix_id is None:
            return None
        rows = self.members_of(sample)
        hits = np.flatnonzero(self.suffix_ids[rows] == suffix_id)
        return rows.start + int(hits[0]) if len(hits) else None

    def suffix(self, member: int) -> str:
        """The suffix of a member row."""
        return self.suffixes[int(self.suffix_ids[member])]
