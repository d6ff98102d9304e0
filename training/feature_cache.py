"""Feature caches: what a frozen model says of every n-th frame of a data set, computed once, read like shards.

One cache shard per data set shard, committed by receipts and a create-only manifest as data sets are. A sample holds

    KEY.json            a `CachedFeatures` record
    KEY.features.npy    (n, R, T, N, C): n kept frames, R noise draws of the model, its features

A cache fits one data set version and one provider; `FeatureCache.require` checks both. Shape letters as above, F all
kept frames of the cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from infra.config import Config
from infra.digests import sha256_bytes, short
from infra.errors import ConfigError, DataError, ForeframeError, InputError
from infra.storage import absolute, exists, join, read_bytes
from ingest.index import ShardIndex
from ingest.reader import MANIFEST_NAME, OpenShard, Split, index_of, open_shard
from ingest.schema import Receipt
from training.cache import Dtype, read_npy_header
from training.providers import FeatureProviderConfig

SCHEMA_VERSION = 1
FEATURE_CACHE = "feature-cache"
FEATURES_SUFFIX = "features.npy"
HEADER_BYTES = 1024  # more than any npy header of five dimensions


class FeatureCacheConfig(Config):
    """What is computed and kept. `every` n-th frame of each sample, the first one among them, is one observation.

    `num_draws` draws of a video model's noise are kept for each: number 0 is the one a deployed policy acts with. Still
    encoders draw nothing, so theirs is 1.
    """

    kind: Literal["cache-features"] = "cache-features"
    data: str = Field(min_length=1)
    split: Split | None = "train"
    provider: FeatureProviderConfig
    every: int = Field(default=1, ge=1)
    num_draws: int = Field(default=1, ge=1)
    dtype: Dtype = Field(default="float16", description="of the stored features; they are computed in float32 or bf16")
    batch_frames: int = Field(default=16, ge=1, description="observations computed together")
    workers: int = Field(default=2, ge=0, description="Ray Data actors, one model each; 0 computes in this process")
    use_gpu: bool = False
    output: str = Field(min_length=1)


class CachedSample(Config):
    """`KEY.json` of a cache."""

    key: str
    source_id: str
    frames: tuple[int, ...]  # of the sample, in the order of the features


class FeatureManifest(Config):
    """`manifest.json` of a cache, written once when all receipts exist; the cache's version is its sha256."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["feature-cache"] = "feature-cache"
    data_version: str
    split: Split | None = None
    provider_digest: str
    provider: dict[str, Any]
    feature_shape: tuple[int, int, int]
    every: int
    num_draws: int
    dtype: Dtype
    recipe: dict[str, Any] = Field(default_factory=dict, description="whatever else decides the bytes")
    plan_id: str = ""
    receipts: tuple[Receipt, ...] = ()
    num_samples: int = 0
    num_frames: int = 0
    num_failures: int = 0
    inputs: tuple[str, ...] = ()


class FeatureCache:
    """The reader; samples go by key. Raises `InputError` when `url` holds no complete cache, `DataError` for damage."""

    def __init__(self, url: str) -> None:
        self.url = absolute(url)
        self.manifest, self.version = load_feature_manifest(self.url)
        self.feature_shape = self.manifest.feature_shape
        self.num_draws = self.manifest.num_draws
        self.every = self.manifest.every
        self._places: dict[str, tuple[int, int]] | None = None
        self._open: dict[int, OpenShard] = {}
        self._headers: dict[str, tuple[OpenShard, int, int, int]] = {}
        self._loaded: dict[str, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_headers": {}, "_places": None}

    def __contains__(self, key: str) -> bool:
        return key in self._index()

    @property
    def num_bytes(self) -> int:
        """Of all features, as stored."""
        item = np.dtype(self.manifest.dtype).itemsize
        return self.manifest.num_frames * self.num_draws * math.prod(self.feature_shape) * item

    def features(self, key: str, frames: Sequence[int], draw: int = 0) -> torch.Tensor:
        """(len(frames), T, N, C) as stored; `InputError` for a frame or draw that the cache does not hold."""
        if not 0 <= draw < self.num_draws:
            raise InputError(f"{self.url} holds {self.num_draws} noise draws, not number {draw}.")
        rows = [self._row(key, frame) for frame in frames]
        if key in self._loaded:
            return self._loaded[key][rows, draw]
        return torch.stack([self._read(key, row)[draw] for row in rows])

    def preload(self) -> None:
        """Hold everything in memory; a batch then costs a copy."""
        for key in self._index():
            shard, row, start, count = self._header(key)
            self._loaded[key] = self._parse(shard.pread(row, start=start, num_bytes=count * self._frame_bytes), count)

    def require(self, *, data_version: str, provider_digest: str) -> None:
        """`InputError`, one line naming both values, when the cache is of another data set or provider."""
        checks = (
            ("data set", self.manifest.data_version, data_version),
            ("provider", self.manifest.provider_digest, provider_digest),
        )
        for what, found, asked in checks:
            if found != asked:
                raise InputError(
                    f"feature cache {self.url} is of {what} {short(found)}, asked for is {short(asked)}.",
                    remedy="Build a cache for it with cache-features.",
                )

    @property
    def _frame_bytes(self) -> int:
        return np.dtype(self.manifest.dtype).itemsize * self.num_draws * math.prod(self.feature_shape)

    def _row(self, key: str, frame: int) -> int:
        number, rest = divmod(frame, self.every)
        count = self._header(key)[3]
        if rest or not 0 <= number < count:
            raise InputError(
                f"{self.url}: frame {frame} of {key} is not cached, only every {self.every}th of "
                f"{(count - 1) * self.every + 1}.",
                remedy="Use a cache of smaller `every`, or decisions at its frames (data.every).",
            )
        return number

    def _read(self, key: str, row: int) -> torch.Tensor:
        shard, member, start, _ = self._header(key)
        data = shard.pread(member, start=start + row * self._frame_bytes, num_bytes=self._frame_bytes)
        return self._parse(data, 1)[0]

    def _parse(self, data: bytes, count: int) -> torch.Tensor:
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        values = np.frombuffer(bytearray(data), dtype).reshape(count, self.num_draws, *self.feature_shape)
        return torch.from_numpy(values.astype(self.manifest.dtype, copy=False))

    def _header(self, key: str) -> tuple[OpenShard, int, int, int]:
        """(shard, member row, where the values begin, kept frames)."""
        if key not in self._headers:
            self._headers[key] = self._read_header(key)
        return self._headers[key]

    def _read_header(self, key: str) -> tuple[OpenShard, int, int, int]:
        place = self._index().get(key)
        if place is None:
            raise DataError(f"feature cache {self.url} holds no sample {key}.", remedy="Was it built of this split?")
        position, number = place
        if position not in self._open:
            self._open[position] = open_shard(self.url, self.manifest.receipts[position])
        shard = self._open[position]
        where = f"{shard.describe(number)}: {FEATURES_SUFFIX}"
        row = shard.index.find(number, FEATURES_SUFFIX)
        if row is None:
            raise DataError(f"{where} is missing.", remedy="Build the cache again.")
        length = int(shard.index.lengths[row])
        start, shape, dtype = read_npy_header(shard.pread(row, num_bytes=min(length, HEADER_BYTES)), where=where)
        expected = np.dtype(self.manifest.dtype).newbyteorder("<")
        if shape[1:] != (self.num_draws, *self.feature_shape) or dtype != expected:
            raise DataError(f"{where} is {dtype} {shape}, not {expected} of {self.feature_shape}.")
        if length != start + shape[0] * self._frame_bytes:
            raise DataError(f"{where} has {length} bytes, too few or too many for {shape}.")
        return shard, row, start, shape[0]

    def _index(self) -> dict[str, tuple[int, int]]:
        """Key -> (position of its receipt, sample in that shard)."""
        if self._places is None:
            self._places = {
                key: (position, number)
                for position, receipt in enumerate(self.manifest.receipts)
                for number, key in enumerate(ShardIndex(index_of(self.url, receipt)).keys)
            }
        return self._places


def load_feature_manifest(url: str) -> tuple[FeatureManifest, str]:
    """(manifest, version); `InputError` for a folder that holds no complete cache, `DataError` for a wrong one."""
    place = join(url, MANIFEST_NAME)
    if not exists(place):
        raise InputError(
            f"{url} holds no {MANIFEST_NAME}, so it is no complete feature cache.",
            remedy="Check the path, or run cache-features again: it resumes.",
        )
    data = read_bytes(place)
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or value.get("kind") != FEATURE_CACHE:
            raise InputError(f"{url} is no feature cache.", remedy="A cache is what cache-features writes.")
        return FeatureManifest.parse(value), sha256_bytes(data)
    except (ValueError, ConfigError) as error:
        if isinstance(error, ForeframeError) and not isinstance(error, ConfigError):
            raise
        raise DataError(f"{place} is not a manifest: {error}.") from None
