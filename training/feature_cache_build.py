"""Computing a feature cache: every kept frame through the frozen model once, for every noise draw.

A shard's bytes are a function of the data set, the provider, `FeatureCacheConfig.batch_frames` and the library versions
that its receipt names: batches never mix samples, and the last one of a sample is filled up, so that arithmetic does
not depend on how long an episode is. One Ray Data row is one shard; no feature passes the object store.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from infra.digests import pretty_json
from infra.errors import ConfigError, DataError, MachineError
from infra.faults import fault_point
from infra.ray_data import to_row
from infra.storage import absolute, exists, join
from ingest.reader import MANIFEST_NAME, ShardDataset
from ingest.receipt import committed_shards, workspace
from ingest.schema import Receipt, shard_name
from ingest.shard import Member, ShardWriter
from training.cache import pack_npy
from training.cache_build import build_on_ray
from training.cache_shards import (
    STAGE,
    fill_cache,
    publish_filled,
    samples_of_shards,
    sealed,
    steady_arithmetic,
    write_log,
)
from training.feature_cache import (
    FEATURES_SUFFIX,
    CachedSample,
    FeatureCacheConfig,
    FeatureManifest,
    load_feature_manifest,
)
from training.protocols import FeatureProvider
from training.providers import build_provider, references, with_url

log = logging.getLogger(__name__)


def run(config: FeatureCacheConfig) -> dict[str, Any]:
    """Fill the cache, or what is missing of it; returns a summary. Raises `InputError`, `DataError`, `ConfigError`."""
    config = _resolved(config)
    started = time.monotonic()
    dataset, provider = _parts(config)
    header = cache_header(config, dataset, provider)
    size = _size(config, header, dataset)
    log.info("%s will hold %d observations, %.1f MB", config.output, size["observations"], size["bytes"] / 1e6)

    def build(shards: list[int]) -> Iterator[Receipt]:
        if config.workers == 0 or not shards:
            filler = FeatureFiller(config, header, dataset, provider)
            yield from (filler.build(shard) for shard in shards)
        else:
            arguments = {"config": config.to_json(), "header": header.to_json()}
            yield from build_on_ray(
                shards, FeatureActor, arguments=arguments, workers=config.workers, use_gpu=config.use_gpu,
                what="feature cache",
            )  # fmt: skip

    manifest, version = fill_cache(header, config.output, samples_of_shards(dataset), build, load=load_feature_manifest)
    log.info("%s: %d samples, %d observations", config.output, manifest.num_samples, manifest.num_frames)
    return {
        "kind": config.kind,
        "output": config.output,
        "version": version,
        "data_version": manifest.data_version,
        "provider_digest": manifest.provider_digest,
        "num_samples": manifest.num_samples,
        "num_frames": manifest.num_frames,
        "bytes": sum(receipt.tar_bytes for receipt in manifest.receipts),
        "seconds": round(time.monotonic() - started, 3),
    }


def plan(config: FeatureCacheConfig) -> dict[str, Any]:
    """What `run` would do, without writing anything: observations, bytes of each and in all, shards already there."""
    config = _resolved(config)
    dataset, provider = _parts(config)
    header = cache_header(config, dataset, provider)
    return {
        "kind": config.kind,
        "output": config.output,
        "data_version": dataset.version,
        "provider_digest": provider.digest,
        "feature_shape": list(provider.feature_shape),
        **_size(config, header, dataset),
        "shards": len(samples_of_shards(dataset)),
        "shards_committed": len(committed_shards(config.output)),
        "complete": exists(join(config.output, MANIFEST_NAME)),
    }


def cache_header(config: FeatureCacheConfig, dataset: ShardDataset, provider: FeatureProvider) -> FeatureManifest:
    """The manifest without its receipts: what the cache is of."""
    if config.num_draws > 1 and config.provider.kind != "tvp":
        raise ConfigError(
            f"num_draws = {config.num_draws}: {config.provider.kind!r} features are not drawn.", remedy="Use 1."
        )
    return sealed(
        FeatureManifest(
            data_version=dataset.version,
            split=config.split,
            provider_digest=provider.digest,
            provider={name: value for name, value in config.provider.to_json().items() if name not in ("url", "path")},
            feature_shape=provider.feature_shape,
            every=config.every,
            num_draws=config.num_draws,
            dtype=config.dtype,
            recipe={"batch_frames": config.batch_frames},
            inputs=(dataset.version, *(item.digest for item in references(config.provider))),
        )
    )


class FeatureFiller:
    """Builds and commits cache shards; the same in this process and in an actor."""

    def __init__(
        self, config: FeatureCacheConfig, header: FeatureManifest, dataset: ShardDataset, provider: FeatureProvider
    ) -> None:
        self._config, self._header = config, header
        self._dataset, self._provider = dataset, provider
        self._samples = samples_of_shards(dataset)

    def build(self, shard: int) -> Receipt:
        """Build one shard and commit it; returns its receipt."""
        started, num_frames = time.monotonic(), 0
        with steady_arithmetic(), workspace(self._config.output, shard) as folder:
            tar = folder / f"{shard_name(shard)}.tar"
            with ShardWriter(tar) as writer:
                for index in self._samples[shard]:
                    members, count = self._members(index)
                    writer.add(self._dataset.key(index), members)
                    num_frames += count
                    fault_point(f"{STAGE}.after_sample")
            receipt = publish_filled(
                self._config.output, self._header, shard, tar, writer.close(),
                num_frames=num_frames, engine={"torch": str(torch.__version__), "device": _device(self._config)},
            )  # fmt: skip
        write_log(self._config.output, receipt, seconds=time.monotonic() - started)
        return receipt

    def _members(self, index: int) -> tuple[list[Member], int]:
        dataset, key = self._dataset, self._dataset.key(index)
        frames = range(0, dataset.num_frames(index, self._provider.cameras[0]), self._config.every)
        record = CachedSample(key=key, source_id=dataset.record(index).source_id, frames=tuple(frames))
        parts = [
            self._observations(index, frames[start : start + self._config.batch_frames])
            for start in range(0, len(frames), self._config.batch_frames)
        ]
        with np.errstate(over="ignore"):  # reported below
            values = np.concatenate(parts).astype(self._config.dtype)
        if not np.isfinite(values).all():
            raise DataError(f"{key}: its features are not finite in {self._config.dtype}.", remedy="Use dtype=float32.")
        return [Member("json", pretty_json(record.to_json())), Member(FEATURES_SUFFIX, pack_npy(values))], len(frames)

    def _observations(self, index: int, frames: range) -> np.ndarray:
        """(n, R, T, N, C) of n frames; the batch is filled up with its last frame, so its shape is always the same."""
        filled = [*frames, *[frames[-1]] * (self._config.batch_frames - len(frames))]
        images = {camera: self._dataset.frames(index, filled, camera) for camera in self._provider.cameras}
        text = [self._dataset.text(index)] * len(filled)
        draws = []
        for number in range(self._config.num_draws):
            drawn = {"draw": number} if number else {}  # still encoders draw nothing
            draws.append(self._provider.features(images, text, **drawn)[: len(frames)].float().cpu())
        return torch.stack(draws, dim=1).numpy()


class FeatureActor:
    """What a Ray Data actor holds: a provider, loaded with its first row, so that a bad one is an answer, no crash."""

    def __init__(self, config: dict[str, Any], header: dict[str, Any]) -> None:
        logging.basicConfig(level=logging.INFO)
        self._config, self._header = FeatureCacheConfig.parse(config), FeatureManifest.parse(header)
        self._filler: FeatureFiller | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """One shard: the row of its receipt, or of the error that a user can mend."""
        return to_row(lambda: self._build(int(row["shard"])))

    def _build(self, shard: int) -> dict[str, Any]:
        if self._filler is None:
            self._filler = FeatureFiller(self._config, self._header, *_parts(self._config))
        return self._filler.build(shard).to_json()


def _size(config: FeatureCacheConfig, header: FeatureManifest, dataset: ShardDataset) -> dict[str, int]:
    camera = config.provider.cameras[0]
    observations = sum(math.ceil(dataset.num_frames(index, camera) / config.every) for index in range(len(dataset)))
    each = np.dtype(config.dtype).itemsize * config.num_draws * math.prod(header.feature_shape)
    return {"observations": observations, "bytes_per_observation": each, "bytes": observations * each}


def _parts(config: FeatureCacheConfig) -> tuple[ShardDataset, FeatureProvider]:
    device = _device(config)
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("use_gpu is set but this process sees no GPU.", remedy="Unset use_gpu.")
    return ShardDataset(config.data, split=config.split), build_provider(config.provider, device=device)


def _device(config: FeatureCacheConfig) -> str:
    return "cuda" if config.use_gpu else "cpu"


def _resolved(config: FeatureCacheConfig) -> FeatureCacheConfig:
    places = {"data": absolute(config.data), "output": absolute(config.output)}
    if places["data"].rstrip("/") == places["output"].rstrip("/"):
        raise ConfigError(f"output is the data set's own folder {places['data']}.", remedy="Give the cache its own.")
    url = getattr(config.provider, "url", "")
    provider = with_url(config.provider, absolute(url)) if url else config.provider
    return config.model_copy(update={**places, "provider": provider})
