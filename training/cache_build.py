"""Computing a latent cache: every frame through the VAE once, every sentence through the text encoder once.

A shard's bytes are a function of the data set, the weights, `CacheConfig.batch_frames` and the library versions that
its receipt names: batches never mix samples or cameras, and arithmetic is float32 in one thread of a fixed matmul
library, whatever the process was set to. Other batch sizes change moments by about 1e-6 of their size. Parallelism
comes from Ray Data actors with a VAE each; one row is one shard, and no latent passes the object store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from infra.errors import ConfigError, InputError, MachineError, ServiceError
from infra.ray_data import from_row, quiet_driver, to_row
from infra.ray_runtime import connect
from infra.storage import absolute, exists, join
from ingest.reader import MANIFEST_NAME, ShardDataset
from ingest.receipt import committed_shards
from ingest.schema import Receipt
from training.cache import CACHE_KIND, CacheConfig, CacheManifest, load_cache_manifest
from training.cache_shards import Filled, Floats, ShardFiller, fill_cache, samples_of_shards, sealed
from training.data.video_clips import resize_clip, to_model_range
from training.export_video import FrozenVAE, load_vae, video_digest
from training.models.common.text import TextEncoderConfig, TokenEncoder

log = logging.getLogger(__name__)

MAX_RESTARTS = 3  # of one actor; Ray's default is without end


def run(config: CacheConfig) -> dict[str, Any]:
    """Fill the cache, or what is missing of it; returns a summary. Raises `InputError`, `DataError`, `ConfigError`."""
    config = _resolved(config)
    started = time.monotonic()
    dataset, vae, text = _parts(config)
    header = cache_header(config, dataset, vae, text)

    def build(shards: list[int]) -> Iterator[Receipt]:
        if config.workers == 0 or not shards:
            filler = _filler(config, header, dataset, vae, text)
            yield from (filler.build(shard) for shard in shards)
        else:
            arguments = {"config": config.to_json(), "header": header.to_json()}
            yield from build_on_ray(
                shards,
                ShardActor,
                arguments=arguments,
                workers=config.workers,
                use_gpu=config.use_gpu,
                what="latent cache",
            )

    manifest, version = fill_cache(header, config.output, samples_of_shards(dataset), build, load=load_cache_manifest)
    summary = summarise(manifest, version, config.output)
    log.info("%s: %d samples, %d frames", config.output, manifest.num_samples, manifest.num_frames)
    return summary | {"seconds": round(time.monotonic() - started, 3)}


def plan(config: CacheConfig) -> dict[str, Any]:
    """What `run` would do, without writing anything: frames, bytes per frame, total bytes, shards already there."""
    config = _resolved(config)
    dataset, vae, text = _parts(config)
    header = cache_header(config, dataset, vae, text)
    frames = sum(
        dataset.num_frames(index, camera)
        for index in range(len(dataset))
        for camera in _cameras(config, dataset, index)
    )
    frame_bytes = np.dtype(config.dtype).itemsize * 2 * int(np.prod(header.latent_shape))
    text_bytes = 4 * int(np.prod(header.text_shape))
    return {
        "kind": config.kind,
        "output": config.output,
        "data_version": dataset.version,
        "vae_digest": vae.digest,
        "text_digest": text.digest,
        "samples": len(dataset),
        "frames": frames,
        "latent_shape": list(header.latent_shape),
        "bytes_per_frame": frame_bytes,
        "text_bytes_per_sample": text_bytes,
        "bytes": frames * frame_bytes + len(dataset) * text_bytes,
        "shards": len(samples_of_shards(dataset)),
        "shards_committed": len(committed_shards(config.output)),
        "complete": exists(join(config.output, MANIFEST_NAME)),
    }


def summarise(manifest: CacheManifest, version: str, output: str) -> dict[str, Any]:
    """The facts of a finished cache that callers log and pass on."""
    return {
        "kind": CACHE_KIND,
        "output": output,
        "version": version,
        "data_version": manifest.data_version,
        "vae_digest": manifest.vae_digest,
        "text_digest": manifest.text_digest,
        "latent_shape": list(manifest.latent_shape),
        "num_samples": manifest.num_samples,
        "num_frames": manifest.num_frames,
        "num_failures": manifest.num_failures,
        "bytes": sum(receipt.tar_bytes for receipt in manifest.receipts),
    }


def cache_header(config: CacheConfig, dataset: ShardDataset, vae: FrozenVAE, text: TokenEncoder) -> CacheManifest:
    """The manifest without its receipts: what the cache is of."""
    downscale = vae.config.downscale
    if config.image_size % downscale:
        raise ConfigError(
            f"image_size = {config.image_size} is no multiple of {downscale}, the VAE's pixels per latent.",
            remedy=f"Use {config.image_size // downscale * downscale or downscale}.",
        )
    side = config.image_size // downscale
    return sealed(
        CacheManifest(
            data_version=dataset.version,
            split=config.split,
            vae_digest=vae.digest,
            text_digest=text.digest,
            text=text_identity(config.text),
            text_shape=(config.text.max_tokens, text.dim),
            image_size=config.image_size,
            latent_shape=(vae.config.latent_channels, side, side),
            scaling_factor=vae.scale,
            dtype=config.dtype,
            recipe={"batch_frames": config.batch_frames, "cameras": list(config.cameras)},
            inputs=(dataset.version, video_digest(config.vae)),
        )
    )


def text_identity(config: TextEncoderConfig) -> dict[str, Any]:
    """The text settings without the folder they happened to lie in."""
    return {name: value for name, value in config.to_json().items() if name != "path"}


class VAEFill:
    """A sample's frames through the VAE: squashed to the cache's side, [-1, 1], `batch_frames` at a time."""

    def __init__(self, config: CacheConfig, vae: FrozenVAE) -> None:
        self._config, self._vae = config, vae

    def __call__(self, dataset: ShardDataset, index: int) -> Filled:
        """Moments of every frame of the wanted cameras."""
        cameras = _cameras(self._config, dataset, index)
        return Filled({camera: self._encode(dataset, index, camera) for camera in cameras})

    def _encode(self, dataset: ShardDataset, index: int, camera: str) -> Floats:
        size, batch = self._config.image_size, self._config.batch_frames
        parts = []
        num_frames = dataset.num_frames(index, camera)
        for start in range(0, num_frames, batch):
            frames = dataset.frames(index, range(start, min(start + batch, num_frames)), camera)
            mean, std = self._vae.encode(to_model_range(resize_clip(frames, size)), chunk=batch)
            parts.append(torch.stack([mean, std], dim=1).float().cpu().numpy())
        return np.concatenate(parts)


class ShardActor:
    """What a Ray Data actor holds: a VAE, loaded with its first row so that a bad one is an answer, not a crash."""

    def __init__(self, config: dict[str, Any], header: dict[str, Any]) -> None:
        logging.basicConfig(level=logging.INFO)
        self._config, self._header = CacheConfig.parse(config), CacheManifest.parse(header)
        self._filler: ShardFiller | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """One shard: the row of its receipt, or of the error that a user can mend."""
        return to_row(lambda: self._build(int(row["shard"])))

    def _build(self, shard: int) -> dict[str, Any]:
        if self._filler is None:
            self._filler = _filler(self._config, self._header, *_parts(self._config))
        return self._filler.build(shard).to_json()


def build_on_ray(
    shards: list[int], actor: type, *, arguments: dict[str, Any], workers: int, use_gpu: bool, what: str
) -> Iterator[Receipt]:
    """The receipts of shards that Ray Data actors build; `actor(**arguments)` answers rows {"shard": number}."""
    with connect(workers):
        import ray.data
        from ray.exceptions import RayError

        quiet_driver()
        filled = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards)).map(
            actor,
            fn_constructor_kwargs=arguments,
            num_cpus=1,
            num_gpus=1 if use_gpu else None,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards))),
            ray_remote_args_fn=_limits,
        )
        try:
            for row in filled.iter_rows():
                yield Receipt.parse(from_row(row))
        except RayError as error:
            reason = str(error).strip().splitlines()[-1].partition(". ")[0]  # the rest is a paragraph of advice
            raise ServiceError(
                f"filling the {what} on Ray failed: {reason}.",
                remedy="Run again: committed shards stay. Workers that keep dying have too little memory.",
            ) from error


def _limits() -> dict[str, int]:
    return {"max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS}


def _filler(
    config: CacheConfig, header: CacheManifest, dataset: ShardDataset, vae: FrozenVAE, text: TokenEncoder
) -> ShardFiller:
    if config.use_gpu:
        if not torch.cuda.is_available():
            raise MachineError("use_gpu is set but this process sees no GPU.", remedy="Unset use_gpu.")
        vae = vae.to("cuda")
    engine = {"torch": str(torch.__version__), "device": "cuda" if config.use_gpu else "cpu"}
    return ShardFiller(header, config.output, dataset=dataset, fill=VAEFill(config, vae), text=text, engine=engine)


def _parts(config: CacheConfig) -> tuple[ShardDataset, FrozenVAE, TokenEncoder]:
    return ShardDataset(config.data, split=config.split), load_vae(config.vae), TokenEncoder(config.text)


def _cameras(config: CacheConfig, dataset: ShardDataset, index: int) -> tuple[str, ...]:
    """The cameras of a sample to encode."""
    record = dataset.record(index)
    if lacking := [name for name in config.cameras if name not in record.cameras]:
        raise InputError(
            f"sample {record.key} has no camera {lacking[0]!r}, only {sorted(record.cameras)}.",
            remedy="Name cameras that every sample has, or none: then all of each are cached.",
        )
    return config.cameras or tuple(record.cameras)


def _resolved(config: CacheConfig) -> CacheConfig:
    places = {"data": absolute(config.data), "vae": absolute(config.vae), "output": absolute(config.output)}
    if places["data"].rstrip("/") == places["output"].rstrip("/"):
        raise ConfigError(f"output is the data set's own folder {places['data']}.", remedy="Give the cache its own.")
    return config.model_copy(update=places)
