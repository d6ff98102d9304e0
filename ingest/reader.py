"""`ShardDataset`: random access to the samples of a data set, one `pread` a frame.

Only `manifest.json` is trusted: shards, sizes and hashes come from it, and a tar or index that disagrees is refused.
Handles open lazily and per process, so a data set can be pickled into loader workers. Shards of an `s3://` data set
are read through the node's whole-shard cache.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from infra.digests import sha256_bytes, sha256_file
from infra.errors import DataError, ForeframeError, InputError
from infra.media_decode import decode_video
from infra.media_encode import decode_jpeg
from infra.settings import settings
from infra.storage import absolute, exists, is_remote, join, read_bytes, read_range
from ingest.cache import ShardCache
from ingest.index import ShardIndex
from ingest.schema import (
    DEFAULT_CAMERA,
    SCHEMA_VERSION,
    CameraRecord,
    Layout,
    Manifest,
    Receipt,
    SampleRecord,
    shard_name,
    video_suffix,
)

Frames = npt.NDArray[np.uint8]
Split = Literal["train", "validation"]
MANIFEST_NAME = "manifest.json"
MAX_OPEN_SHARDS = 64  # two descriptors each at most
MAX_CACHED_RECORDS = 256
MAX_ARRAYS_BYTES = 1 << 30  # unpacked: a few kilobytes of deflate can claim terabytes


class ShardDataset:
    """The samples of one data set version, optionally those of one `split` (a record without one is "train").

    Raises `InputError` when `url` holds no complete data set, `DataError` when a file is not what the manifest says.
    Without `camera` the methods below use "main" or, where a sample has none of that name, its first one.
    """

    def __init__(self, url: str, *, split: Split | None = None, cache: ShardCache | None = None) -> None:
        self.url = absolute(url)
        self.manifest, self.version = load_manifest(self.url)
        self.split = split
        self._cache = cache
        sizes = [receipt.num_samples for receipt in self.manifest.receipts]
        self._ends = np.cumsum(np.asarray(sizes, np.int64))
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._records: OrderedDict[int, SampleRecord] = OrderedDict()
        self._indices: dict[int, ShardIndex] = {}
        self._samples = np.arange(sum(sizes), dtype=np.int64)
        if split is not None:
            chosen = [index for index in range(sum(sizes)) if self._split_of(index) == split]
            self._samples = np.asarray(chosen, np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_records": OrderedDict(), "_indices": {}}

    @property
    def layout(self) -> Layout:
        """`frames` or `video`."""
        return self.manifest.layout

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of this view in each shard: what `SampleOrder` shuffles in windows."""
        bounds = np.searchsorted(self._samples, np.concatenate([[0], self._ends]))
        return tuple(np.diff(bounds).tolist())

    def key(self, index: int) -> str:
        """The sample's key in its tar."""
        shard, sample = self._locate(self._sample(index))
        return shard.index.keys[sample]

    def record(self, index: int) -> SampleRecord:
        """`K.json` of a sample."""
        number = self._sample(index)
        if number not in self._records:
            shard, sample = self._locate(number)
            record = _parse_record(shard.read(sample, "json"), shard.index.keys[sample], shard.describe(sample))
            self._records[number] = record
            while len(self._records) > MAX_CACHED_RECORDS:
                self._records.popitem(last=False)
        return self._records[number]

    def peek(self, index: int) -> SampleRecord:
        """`record` for a walk over all samples: of an `s3://` data set only the record's own bytes come, no shard."""
        if not is_remote(self.url):
            return self.record(index)
        position, sample = self._place(self._sample(index))
        receipt = self.manifest.receipts[position]
        if position not in self._indices:
            self._indices[position] = ShardIndex(index_of(self.url, receipt, cache=self._cache))
        members, name = self._indices[position], shard_name(receipt.shard)
        row = members.find(sample, "json")
        if row is None:
            raise DataError(f"{name}/{members.keys[sample]} has no member 'json'.")
        place = join(self.url, f"{name}.tar")
        data = read_range(place, int(members.offsets[row]), int(members.lengths[row]))
        return _parse_record(data, members.keys[sample], f"{name}/{members.keys[sample]}")

    def num_frames(self, index: int, camera: str | None = None) -> int:
        """Stored frames of one camera."""
        if self.layout == "frames":
            shard, sample = self._locate(self._sample(index))
            return len(shard.frame_rows(sample, camera))
        return self._camera(index, camera)[1].num_frames

    def source_frames(self, index: int, camera: str | None = None) -> npt.NDArray[np.int64]:
        """(T,) frame number in the source video of every stored frame, ascending."""
        if self.layout == "frames":
            shard, sample = self._locate(self._sample(index))
            numbers = shard.index.source_frames[shard.frame_rows(sample, camera)].astype(np.int64)
            return numbers if len(numbers) and numbers[0] >= 0 else np.arange(len(numbers))
        record = self._camera(index, camera)[1]
        numbers = np.arange(record.num_frames) if record.frame_numbers is None else np.array(record.frame_numbers)
        return numbers.astype(np.int64)

    def jpegs(self, index: int, frame_indices: Sequence[int], camera: str | None = None) -> list[bytes]:
        """The stored JPEG of each frame index, one `pread` each; layout `frames` only."""
        if self.layout != "frames":
            raise InputError(f"{self.url} has layout {self.layout!r}, which stores no JPEGs.", remedy="Use frames().")
        shard, sample = self._locate(self._sample(index))
        rows = shard.frame_rows(sample, camera)
        _check_frames(frame_indices, len(rows), shard.describe(sample))
        return [shard.pread(int(rows[frame])) for frame in frame_indices]

    def frames(self, index: int, frame_indices: Sequence[int], camera: str | None = None) -> Frames:
        """(N, H, W, 3) uint8 RGB of the given frame indices, in the given order."""
        if self.layout == "frames":
            images = [decode_jpeg(data) for data in self.jpegs(index, frame_indices, camera)]
            return np.stack(images) if images else np.zeros((0, 0, 0, 3), np.uint8)
        name, record = self._camera(index, camera)
        shard, sample = self._locate(self._sample(index))
        _check_frames(frame_indices, record.num_frames, shard.describe(sample))
        return decode_video(shard.read(sample, video_suffix(name)), list(frame_indices))

    def video_num_bytes(self, index: int, camera: str | None = None) -> int:
        """Size of a camera's stored mp4; layout `video` only."""
        shard, row = self._video(index, camera)
        return int(shard.index.lengths[row])

    def video(self, index: int, camera: str | None = None, *, start: int = 0, num_bytes: int | None = None) -> bytes:
        """A camera's stored mp4, or `num_bytes` of it from byte `start`: one `pread`; layout `video` only."""
        shard, row = self._video(index, camera)
        return shard.pread(row, start=start, num_bytes=num_bytes)

    def arrays(self, index: int) -> dict[str, npt.NDArray[Any]]:
        """Actions, proprioception and whatever else the sample's npz holds; empty when it has none."""
        shard, sample = self._locate(self._sample(index))
        if shard.index.find(sample, "npz") is None:
            return {}
        return _load_arrays(shard.read(sample, "npz"), shard.describe(sample))

    def text(self, index: int) -> str:
        """The sample's sentence, "" when it has none."""
        shard, sample = self._locate(self._sample(index))
        if shard.index.find(sample, "txt") is None:
            return self.record(index).text
        return shard.read(sample, "txt").decode("utf-8").strip()

    def _sample(self, index: int) -> int:
        if not 0 <= index < len(self._samples):
            raise InputError(f"sample {index} of {self.url} does not exist: there are {len(self._samples)}.")
        return int(self._samples[index])

    def _split_of(self, number: int) -> str:
        shard, sample = self._locate(number)
        # Only one word of each record is wanted, and there may be hundreds of thousands of them.
        try:
            record = json.loads(shard.read(sample, "json"))
        except ValueError:
            record = None
        metadata = record.get("metadata") if isinstance(record, dict) else None
        if not isinstance(metadata, dict):
            raise DataError(f"{shard.describe(sample)}: its json is not a sample record.")
        return str(metadata.get("split") or "train")

    def _camera(self, index: int, camera: str | None) -> tuple[str, CameraRecord]:
        record = self.record(index)
        name = camera or _default_camera(list(record.cameras))
        if name not in record.cameras:
            raise InputError(f"sample {record.key} has no camera {name!r}, only {sorted(record.cameras)}.")
        return name, record.cameras[name]

    def _video(self, index: int, camera: str | None) -> tuple[OpenShard, int]:
        if self.layout != "video":
            raise InputError(f"{self.url} has layout {self.layout!r}, which stores no videos.", remedy="Use jpegs().")
        name, _ = self._camera(index, camera)
        shard, sample = self._locate(self._sample(index))
        row = shard.index.find(sample, video_suffix(name))
        if row is None:
            raise DataError(f"{shard.describe(sample)} has no member {video_suffix(name)!r}.")
        return shard, row

    def _locate(self, number: int) -> tuple[OpenShard, int]:
        """(open shard, sample in it) of a sample of the whole data set."""
        position, sample = self._place(number)
        shard = self._open.get(position)
        if shard is None:
            shard = open_shard(self.url, self.manifest.receipts[position], cache=self._cache)
            self._open[position] = shard
            while len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(position)
        return shard, sample

    def _place(self, number: int) -> tuple[int, int]:
        """(shard's position in the manifest, sample in it) of a sample of the whole data set."""
        position = int(np.searchsorted(self._ends, number, side="right"))
        return position, number - int(self._ends[position]) + self.manifest.receipts[position].num_samples


class OpenShard:
    """One shard with its index mapped and its tar open for `pread`; `open_shard` makes them."""

    def __init__(self, index: Path, descriptor: int, receipt: Receipt) -> None:
        self._descriptor = descriptor
        self.name = shard_name(receipt.shard)
        size = os.fstat(descriptor).st_size
        if size != receipt.tar_bytes:
            raise DataError(f"{self.name}.tar has {size} bytes, the manifest says {receipt.tar_bytes}.")
        if not index.is_file() or sha256_file(index) != receipt.idx_sha256:
            raise DataError(f"{index} is missing or not the file the manifest names.", remedy="Build the shard again.")
        self.index = ShardIndex(index)
        found = (self.index.tar_sha256, self.index.tar_bytes, self.index.num_samples)
        if found != (receipt.tar_sha256, receipt.tar_bytes, receipt.num_samples):
            raise DataError(f"{index} belongs to another tar than the manifest's {self.name}.")
        self._map_suffixes()

    def __del__(self) -> None:
        os.close(self._descriptor)

    def _map_suffixes(self) -> None:
        """Camera and frame index of every distinct suffix, so that a clip's frames are found without parsing names."""
        self.cameras: dict[str, int] = {}
        num_suffixes = len(self.index.suffixes)
        self._camera_of = np.full(num_suffixes, -1, np.int64)
        self._frame_of = np.full(num_suffixes, -1, np.int64)
        for number, suffix in enumerate(self.index.suffixes):
            stem, _, kind = suffix.rpartition(".")
            camera, _, frame = stem.rpartition(".")
            if kind == "jpg" and frame[:1] == "f" and frame[1:].isdigit():
                self._camera_of[number] = self.cameras.setdefault(camera or DEFAULT_CAMERA, len(self.cameras))
                self._frame_of[number] = int(frame[1:])

    def frame_rows(self, sample: int, camera: str | None) -> npt.NDArray[np.int64]:
        """Member rows of a camera's frames 0..T-1."""
        rows = self.index.members_of(sample)
        suffix_ids = self.index.suffix_ids[rows]
        cameras = self._camera_of[suffix_ids]
        if camera is None:
            present = [name for name, number in self.cameras.items() if number in cameras]
            camera = _default_camera(present) if present else DEFAULT_CAMERA
        members = np.flatnonzero(cameras == self.cameras.get(camera, -2))
        if not len(members):
            raise InputError(f"{self.describe(sample)} has no frames of camera {camera!r}.")
        frames = self._frame_of[suffix_ids[members]]
        order = np.argsort(frames, kind="stable")
        if not np.array_equal(frames[order], np.arange(len(frames))):
            raise DataError(f"{self.describe(sample)}: frames of {camera!r} are not numbered 0 to {len(frames) - 1}.")
        return members[order] + rows.start

    def read(self, sample: int, suffix: str) -> bytes:
        """The content of one member."""
        row = self.index.find(sample, suffix)
        if row is None:
            raise DataError(f"{self.describe(sample)} has no member {suffix!r}.")
        return self.pread(row)

    def pread(self, row: int, *, start: int = 0, num_bytes: int | None = None) -> bytes:
        """The content of one member row, or `num_bytes` of it from byte `start`; never beyond its end."""
        length = int(self.index.lengths[row]) - start if num_bytes is None else num_bytes
        if start < 0 or length < 0 or start + length > int(self.index.lengths[row]):
            raise DataError(f"{self.name}.tar: bytes {start} to {start + length} lie outside member {row}.")
        offset = int(self.index.offsets[row]) + start
        data = os.pread(self._descriptor, length, offset)
        if len(data) != length:
            raise DataError(f"{self.name}.tar gave {len(data)} of {length} bytes at {offset}.")
        return data

    def describe(self, sample: int) -> str:
        """For messages: `shard-00000/KEY`."""
        return f"{self.name}/{self.index.keys[sample]}"


def open_shard(url: str, receipt: Receipt, *, cache: ShardCache | None = None) -> OpenShard:
    """Open a committed shard below `url`; a remote one comes whole through `cache` (default: the node's own).

    Raises `DataError` unless index and tar are the files the receipt names.
    """
    index, place = index_of(url, receipt, cache=cache), join(url, f"{shard_name(receipt.shard)}.tar")
    if not is_remote(url):
        return OpenShard(index, _open_local(Path(place)), receipt)
    tar = (cache or default_cache()).open(place, sha256=receipt.tar_sha256, size_bytes=receipt.tar_bytes)
    return OpenShard(index, tar, receipt)


def index_of(url: str, receipt: Receipt, *, cache: ShardCache | None = None) -> Path:
    """Local path of a shard's index, without its tar."""
    place = join(url, f"{shard_name(receipt.shard)}.idx")
    return (cache or default_cache()).fetch(place, sha256=receipt.idx_sha256) if is_remote(url) else Path(place)


def load_manifest(url: str) -> tuple[Manifest, str]:
    """(manifest, version) of a data set; `InputError` for a folder that has none, `DataError` for a wrong one."""
    place = join(url, MANIFEST_NAME)
    if not exists(place):
        raise InputError(
            f"{url} holds no {MANIFEST_NAME}, so it is no complete data set.",
            remedy="Check the path, or run the ingest again: it resumes.",
        )
    data = read_bytes(place)
    try:
        manifest = Manifest.parse(json.loads(data))
    except (ValueError, ForeframeError) as error:
        raise DataError(f"{place} is not a manifest: {error}") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise DataError(f"{place} has schema version {manifest.schema_version}; this code reads {SCHEMA_VERSION}.")
    if sum(receipt.num_samples for receipt in manifest.receipts) != manifest.num_samples:
        raise DataError(f"{place} counts {manifest.num_samples} samples, its receipts another number.")
    return manifest, sha256_bytes(data)


def default_cache() -> ShardCache:
    """The node's cache, as `FOREFRAME_CACHE_FOLDER` and `FOREFRAME_CACHE_BYTES` say."""
    return ShardCache(Path(settings().cache_folder).expanduser(), quota_bytes=settings().cache_bytes)


def _open_local(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(f"{path} is missing though the manifest names it.", remedy="Build the shard again.") from None


def _default_camera(cameras: Sequence[str]) -> str:
    return DEFAULT_CAMERA if DEFAULT_CAMERA in cameras else sorted(cameras)[0]


def _check_frames(frame_indices: Sequence[int], num_frames: int, where: str) -> None:
    for frame in frame_indices:
        if not 0 <= frame < num_frames:
            raise InputError(f"{where} has no frame {frame}: it stores {num_frames}.")


def _parse_record(data: bytes, key: str, where: str) -> SampleRecord:
    try:
        record = SampleRecord.parse(json.loads(data))
    except (ValueError, ForeframeError) as error:
        raise DataError(f"{where}: its json is not a sample record: {error}") from None
    if record.key != key or not record.cameras:
        raise DataError(f"{where}: its json names key {record.key!r} or no camera.")
    return record


def _load_arrays(data: bytes, where: str) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_ARRAYS_BYTES:
            raise DataError(f"{where}: its arrays claim {unpacked} bytes, more than {MAX_ARRAYS_BYTES}.")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{where}: its npz cannot be read without executing it: {error}.") from None
