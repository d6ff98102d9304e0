"""Latent caches: VAE moments and text states of a data set, computed once, read like shards.

One cache shard per data set shard, committed by receipts and a create-only manifest as data sets are. A sample holds

    KEY.json                     a `CachedSample`
    KEY.CAMERA.moments.npy       (T, 2, C, h, w): mean and standard deviation of the VAE's posterior, unscaled
    KEY.text.npy                 (L, D) float32: the text encoder's last hidden state

A cache fits one data set version, one VAE, one text encoder and one image size; `LatentCache.require` checks them.
Shape letters: T frames, C latent channels, h and w latent height and width, L text tokens, D width of a text state.
"""

from __future__ import annotations

import io
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from infra.config import Config
from infra.digests import sha256_bytes, short
from infra.errors import ConfigError, DataError, ForeframeError, InputError
from infra.storage import absolute, exists, join, read_bytes
from ingest.index import ShardIndex
from ingest.reader import MANIFEST_NAME, MAX_OPEN_SHARDS, OpenShard, Split, index_of, open_shard
from ingest.schema import DEFAULT_CAMERA, Receipt
from training.models.common.text import TextEncoderConfig

CACHE_SCHEMA_VERSION = 1
CACHE_KIND = "latent-cache"
TEXT_SUFFIX, MOMENTS_END = "text.npy", ".moments.npy"
REMEDY = "Build the cache again."
MAX_ROWS = 4096  # npy headers remembered
HEADER_BYTES = 1024  # more than any npy header of five dimensions
Dtype = Literal["float32", "float16"]


class CacheConfig(Config):
    """What is cached and how. `data` is a data set, `vae` a video-vae export, a tvp export or a diffusers folder."""

    kind: Literal["cache-latents"] = "cache-latents"
    data: str = Field(min_length=1)
    split: Split | None = None
    vae: str = Field(min_length=1)
    text: TextEncoderConfig = TextEncoderConfig()
    image_size: int = Field(default=256, ge=8)
    cameras: tuple[str, ...] = Field(default=(), description="empty: all cameras of each sample")
    dtype: Dtype = Field(default="float32", description="of the stored moments; they are computed in float32")
    batch_frames: int = Field(default=64, ge=1, description="frames of one camera encoded together")
    workers: int = Field(default=2, ge=0, description="Ray Data actors, one VAE each; 0 encodes in this process")
    use_gpu: bool = False
    output: str = Field(min_length=1)


class CachedSample(Config):
    """`KEY.json` of a cache. `sources` holds the sha256 of the file behind each camera of imported latents."""

    key: str
    source_id: str
    text: str = ""
    cameras: dict[str, int]  # camera -> frames
    sources: dict[str, str] = Field(default_factory=dict)


class CacheManifest(Config):
    """`manifest.json` of a cache, written once when all receipts exist; the cache's version is its sha256.

    `posterior` is `gaussian` where mean and deviation are the VAE's, `sample` where only a drawn latent was published:
    then it stands as the mean and the deviation is 0. `vae_digest` is empty where nobody could name the VAE.
    """

    schema_version: int = CACHE_SCHEMA_VERSION
    kind: Literal["latent-cache"] = "latent-cache"
    data_version: str
    split: Split | None = None
    vae_digest: str
    text_digest: str
    text: dict[str, Any]
    text_shape: tuple[int, int]
    image_size: int
    latent_shape: tuple[int, int, int]
    scaling_factor: float
    posterior: Literal["gaussian", "sample"] = "gaussian"
    dtype: Dtype
    recipe: dict[str, Any] = Field(default_factory=dict, description="whatever else decides the bytes")
    plan_id: str = ""
    receipts: tuple[Receipt, ...] = ()
    num_samples: int = 0
    num_frames: int = 0
    num_failures: int = 0
    inputs: tuple[str, ...] = ()


class LatentCache:
    """The reader. Cheap to open, picklable; shards open when first asked for, remote ones through the node's cache.

    Raises `InputError` when `url` holds no complete cache, `DataError` when a file is not what the manifest says.
    Without `camera` the methods use "main" or, where a sample has none of that name, its first one.
    """

    def __init__(self, url: str) -> None:
        self.url = absolute(url)
        self.manifest, self.version = load_cache_manifest(self.url)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._rows: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()
        self._places: dict[str, tuple[int, int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_rows": OrderedDict(), "_places": None}

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __contains__(self, key: str) -> bool:
        return key in self._index()

    @property
    def data_version(self) -> str:
        """Version of the data set whose frames were encoded."""
        return self.manifest.data_version

    @property
    def vae_digest(self) -> str:
        """Digest of the VAE, "" where the origin of imported latents is not known."""
        return self.manifest.vae_digest

    @property
    def text_digest(self) -> str:
        """Digest of the text encoder."""
        return self.manifest.text_digest

    @property
    def image_size(self) -> int:
        """Side of the square frames that were encoded, in pixels."""
        return self.manifest.image_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one frame."""
        return self.manifest.latent_shape

    def keys(self) -> tuple[str, ...]:
        """The samples that are here, in shard order."""
        return tuple(self._index())

    def sample(self, key: str) -> CachedSample:
        """The record of a sample: its cameras with their numbers of frames, its sentence."""
        shard, number = self._locate(key)
        try:
            return CachedSample.parse(json.loads(shard.read(number, "json")))
        except (ValueError, ForeframeError) as error:
            raise DataError(f"{shard.describe(number)}: its json is not a cached sample: {error}") from None

    def num_frames(self, key: str, camera: str | None = None) -> int:
        """Frames of one camera."""
        return self._row(key, camera)[3]

    def moments(self, key: str, camera: str | None, frame_indices: Sequence[int]) -> torch.Tensor:
        """(len(frame_indices), 2, C, h, w) float32: unscaled mean and standard deviation, in the given order."""
        shard, row, start, num_frames = self._row(key, camera)
        wanted = np.asarray(frame_indices, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < num_frames:
            raise InputError(
                f"{self.url}: sample {key} has {num_frames} frames, not {sorted(wanted.tolist())[-1] + 1}."
            )
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        shape = (2, *self.latent_shape)
        frame_bytes = dtype.itemsize * math.prod(shape)
        frames, order = np.unique(wanted, return_inverse=True)
        runs = np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1) if len(frames) else []
        data = b"".join(
            shard.pread(row, start=start + int(run[0]) * frame_bytes, num_bytes=len(run) * frame_bytes) for run in runs
        )
        values = np.frombuffer(data, dtype).reshape(-1, *shape)[order]
        return torch.from_numpy(values.astype(np.float32))

    def text_states(self, key: str) -> torch.Tensor:
        """(L, D) float32: the text encoder's last hidden state of the sample's sentence."""
        shard, number = self._locate(key)
        where = f"{shard.describe(number)}: {TEXT_SUFFIX}"
        values = np.frombuffer(shard.read(number, TEXT_SUFFIX), np.uint8)
        start, shape, dtype = read_npy_header(values[:HEADER_BYTES].tobytes(), where=where)
        expected = self.manifest.text_shape
        if shape != expected or dtype != np.dtype("<f4") or len(values) != start + 4 * math.prod(shape):
            raise DataError(f"{where} is {dtype} {shape}, not float32 {expected}.", remedy=REMEDY)
        return torch.from_numpy(values[start:].view("<f4").reshape(shape).astype(np.float32))

    def require(
        self,
        *,
        data_version: str | None = None,
        vae_digest: str | None = None,
        image_size: int | None = None,
        text_digest: str | None = None,
    ) -> None:
        """`InputError`, one line naming both values, when the cache is of something else; None is not compared."""
        checks = (
            ("data set", self.data_version, data_version),
            ("VAE", self.vae_digest, vae_digest),
            ("image size", self.image_size, image_size),
            ("text encoder", self.text_digest, text_digest),
        )
        for what, found, asked in checks:
            if asked is None or found == asked:
                continue
            raise InputError(
                f"latent cache {self.url} is of {what} {_name(found)}, asked for is {_name(asked)}.",
                remedy="Build a cache for it with cache-latents.",
            )

    def _index(self) -> dict[str, tuple[int, int]]:
        """Key -> (position of its receipt, sample in that shard)."""
        if self._places is None:
            self._places = {
                key: (position, number)
                for position, receipt in enumerate(self.manifest.receipts)
                for number, key in enumerate(ShardIndex(index_of(self.url, receipt)).keys)
            }
        return self._places

    def _place(self, key: str) -> tuple[int, int]:
        place = self._index().get(key)
        if place is not None:
            return place
        failures = (failure for receipt in self.manifest.receipts for failure in receipt.failures)
        reason = next((f": {failure.message}" for failure in failures if failure.key == key), "")
        raise DataError(f"latent cache {self.url} holds no sample {key}{reason}.", remedy="Was it built of this split?")

    def _locate(self, key: str) -> tuple[OpenShard, int]:
        position, number = self._place(key)
        shard = self._open.get(position)
        if shard is None:
            shard = self._open[position] = open_shard(self.url, self.manifest.receipts[position])
            while len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(position)
        return shard, number

    def _row(self, key: str, camera: str | None) -> tuple[OpenShard, int, int, int]:
        """(shard, member row, where the npy's values begin, frames)."""
        shard, number = self._locate(key)
        row = self._camera_row(shard, number, camera)
        place = (self._place(key)[0], row)
        if place not in self._rows:
            self._rows[place] = self._read_row(shard, row, shard.describe(number))
            while len(self._rows) > MAX_ROWS:
                self._rows.popitem(last=False)
        return shard, row, *self._rows[place]

    def _camera_row(self, shard: OpenShard, number: int, camera: str | None) -> int:
        row = shard.index.find(number, moments_suffix(camera or DEFAULT_CAMERA))
        if row is not None:
            return row
        rows = shard.index.members_of(number)
        present = {shard.index.suffix(member): member for member in range(rows.start, rows.stop)}
        cameras = sorted(name.removesuffix(MOMENTS_END) for name in present if name.endswith(MOMENTS_END))
        if camera is not None or not cameras:
            raise InputError(f"{self.url}: {shard.describe(number)} has no camera {camera!r}, only {cameras}.")
        return present[moments_suffix(cameras[0])]

    def _read_row(self, shard: OpenShard, row: int, where: str) -> tuple[int, int]:
        length = int(shard.index.lengths[row])
        where = f"{where}: {shard.index.suffix(row)}"
        start, shape, dtype = read_npy_header(shard.pread(row, num_bytes=min(length, HEADER_BYTES)), where=where)
        expected = np.dtype(self.manifest.dtype).newbyteorder("<")
        if shape[1:] != (2, *self.latent_shape) or dtype != expected:
            raise DataError(f"{where} is {dtype} {shape}, not {expected} of {self.latent_shape}.", remedy=REMEDY)
        if length != start + dtype.itemsize * math.prod(shape):
            raise DataError(f"{where} has {length} bytes, too few or too many for {shape}.", remedy=REMEDY)
        return start, shape[0]


def moments_suffix(camera: str) -> str:
    """Member suffix of one camera's moments: `main.moments.npy`."""
    return camera + MOMENTS_END


def pack_npy(values: npt.NDArray[Any]) -> bytes:
    """An npy (version 1.0) whose bytes follow from the little-endian values alone."""
    buffer = io.BytesIO()
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    np.lib.format.write_array(buffer, little, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def read_npy_header(data: bytes, *, where: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """(where the values begin, shape, dtype) of an npy's first bytes; `DataError` unless C-ordered plain numbers."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"version {version} is not (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise DataError(f"{where} is no npy array: {error}.", remedy=REMEDY) from None
    if fortran or dtype.kind != "f":
        raise DataError(f"{where} holds {dtype} values where plain floats are needed.", remedy=REMEDY)
    return stream.tell(), tuple(shape), dtype


def load_cache_manifest(url: str) -> tuple[CacheManifest, str]:
    """(manifest, version); `InputError` for a folder that holds no complete cache, `DataError` for a wrong one."""
    place = join(url, MANIFEST_NAME)
    if not exists(place):
        raise InputError(
            f"{url} holds no {MANIFEST_NAME}, so it is no complete latent cache.",
            remedy="Check the path, or run cache-latents again: it resumes.",
        )
    data = read_bytes(place)
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or value.get("kind") != CACHE_KIND:
            raise InputError(f"{url} is no latent cache.", remedy="A cache is what cache-latents writes.")
        manifest = CacheManifest.parse(value)
    except (ValueError, ConfigError) as error:
        raise DataError(f"{place} is not a manifest: {error}.") from None
    if manifest.schema_version != CACHE_SCHEMA_VERSION:
        raise DataError(
            f"{place} has schema version {manifest.schema_version}, this code reads {CACHE_SCHEMA_VERSION}."
        )
    return manifest, sha256_bytes(data)


def iter_failures(manifest: CacheManifest) -> Iterator[str]:
    """One sentence per sample or camera that is not in the cache."""
    for receipt in manifest.receipts:
        for failure in receipt.failures:
            yield f"{failure.source_id}: {failure.reason} ({failure.message})"


def _name(value: str | int) -> str:
    if isinstance(value, int):
        return str(value)
    return short(value) if value else "unknown (not recorded)"
