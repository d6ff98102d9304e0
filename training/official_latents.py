"""Published latents of annotated corpora become a latent cache: `.pt` files beside the videos, one per camera.

    [DATASET/]latent_videos*/SPLIT/NAME/CAMERA.pt     a bare float32 tensor [T, C, h, w]

They are already multiplied by the scaling factor and are one *sample* of the VAE's posterior, so the cache holds them
as means with deviation 0 and says so. The annotation names them; it often says `latent_videos/` where the folder is
`latent_videos_svd/`. What is missing, no plain tensor, or of another length than its video is left out and recorded
in the shard's receipt; everything else is kept.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from infra.config import Config
from infra.digests import sha256_bytes
from infra.errors import ConfigError, InputError, TooManyFailuresError
from infra.storage import absolute, join, read_bytes, size_bytes
from ingest.reader import ShardDataset, Split
from ingest.receipt import failure_ledger
from ingest.schema import Failure, ReasonCode, Receipt, SampleRecord
from training.cache import CacheManifest, Dtype, load_cache_manifest
from training.cache_build import summarise, text_identity
from training.cache_shards import Filled, ShardFiller, fill_cache, samples_of_shards, sealed
from training.export_video import load_vae, video_digest
from training.models.common.text import TextEncoderConfig, TokenEncoder

log = logging.getLogger(__name__)

ANNOTATED = "annotated"  # the corpus kind whose layout has such files
STATED_FOLDER, SHIPPED_FOLDER = "latent_videos", "latent_videos_svd"
PIXELS_PER_LATENT = 8
LATENT_CHANNELS = 4
MAX_TENSOR_BYTES = 1 << 30
# What the restricted unpickler raises for content that is anything but tensors, and for damaged files.
NOT_A_TENSOR = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, LookupError, TypeError,
    AttributeError, MemoryError,
)  # fmt: skip


class OfficialLatentsConfig(Config):
    """Which files are imported. `data` is the data set that was ingested from `corpus`.

    `vae` names whose latents they are; without it the cache records that nobody said so, and no digest can be checked.
    """

    kind: Literal["import-latents"] = "import-latents"
    data: str = Field(min_length=1)
    corpus: str = Field(min_length=1, description="folder or s3:// prefix in the annotated layout")
    split: Split | None = None
    vae: str = ""
    scaling_factor: float = Field(default=0.18215, gt=0, description="what the files are multiplied by")
    text: TextEncoderConfig = TextEncoderConfig()
    image_size: int = Field(default=256, ge=8, multiple_of=PIXELS_PER_LATENT)
    dtype: Dtype = "float32"
    max_failure_share: float = Field(default=0.1, ge=0, le=1, description="of samples; above it nothing is committed")
    output: str = Field(min_length=1)


class LatentsError(Exception):
    """A file that becomes a failure record; `reason` is the ledger's code."""

    def __init__(self, reason: ReasonCode, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(message)


def import_official(config: OfficialLatentsConfig) -> dict[str, Any]:
    """Import the latents, or what is missing of them; returns a summary as `cache_build.run` does.

    Raises `ConfigError` for a VAE of another scaling factor, `InputError` for a data set of another kind of corpus,
    `TooManyFailuresError` when more than the allowed share has no usable file.
    """
    places = {name: absolute(getattr(config, name)) for name in ("data", "corpus", "output")}
    config = config.model_copy(update=places)
    dataset, text = ShardDataset(config.data, split=config.split), TokenEncoder(config.text)
    if dataset.manifest.corpus != ANNOTATED:
        raise InputError(
            f"{config.data} was ingested from a corpus of kind {dataset.manifest.corpus!r}.",
            remedy=f"Published latents lie beside corpora of kind {ANNOTATED!r}.",
        )
    header = _header(config, dataset, text)
    filler = ShardFiller(
        header,
        config.output,
        dataset=dataset,
        fill=OfficialFill(config.corpus, header.latent_shape, scaling_factor=config.scaling_factor),
        text=text,
        engine={"torch": str(torch.__version__)},
    )

    def build(shards: list[int]) -> Iterator[Receipt]:
        return (filler.build(shard) for shard in shards)

    def accept(receipts: list[Receipt]) -> None:
        _check_failures(receipts, dataset, config)

    manifest, version = fill_cache(
        header, config.output, samples_of_shards(dataset), build, load=load_cache_manifest, accept=accept
    )
    log.info("%s: %d samples, %d failures", config.output, manifest.num_samples, manifest.num_failures)
    return summarise(manifest, version, config.output)


class OfficialFill:
    """A sample's latents from the files its annotation names."""

    def __init__(self, corpus: str, latent_shape: tuple[int, int, int], *, scaling_factor: float) -> None:
        self._corpus, self._shape, self._scale = corpus, latent_shape, scaling_factor

    def __call__(self, dataset: ShardDataset, index: int) -> Filled:
        """Every camera with a usable file; the others are failures."""
        record = dataset.record(index)
        files = self._listed(record.source_id)
        moments, sources, failures = {}, {}, []
        for camera, stored in record.cameras.items():
            path = files.get(stored.source.path, "")
            try:
                data = self._read(path)
                latents = read_latents(data)
                numbers = self._numbers(dataset, index, camera, latents)
            except LatentsError as error:
                failures.append(_failure(record, path, error))
                continue
            mean = latents.numpy()[numbers].astype(np.float32) / np.float32(self._scale)
            moments[camera] = np.stack([mean, np.zeros_like(mean)], axis=1)
            sources[camera] = sha256_bytes(data)
        return Filled(moments, tuple(failures), sources)

    def _listed(self, source_id: str) -> dict[str, str]:
        """Video path -> latent path, both below the corpus; empty when the annotation is missing or malformed."""
        source = PurePosixPath(source_id)
        folder = source.parent.parent
        name = str(folder / "annotation" / source.parent.name / f"{source.name}.json")
        try:
            record = json.loads(read_bytes(join(self._corpus, name)))
        except (InputError, ValueError):
            return {}
        if not isinstance(record, dict):
            return {}
        videos = _paths(record.get("videos"), "video_path")
        latents = _paths(record.get("latent_videos"), "latent_video_path")
        return {str(folder / video): str(folder / latent) for video, latent in zip(videos, latents, strict=False)}

    def _read(self, path: str) -> bytes:
        if not path:
            raise LatentsError("unreadable", "its annotation names no latents for this camera")
        if not path.endswith(".pt") or not _stays_inside(path):
            raise LatentsError("bad_annotation", f"latents {path!r} are no .pt file inside the corpus")
        for name in (path, _shipped(path)):
            try:
                size = size_bytes(join(self._corpus, name))
            except InputError:
                continue
            if size > MAX_TENSOR_BYTES:
                raise LatentsError("too_large", f"{name} has {size} bytes, more than {MAX_TENSOR_BYTES}")
            return read_bytes(join(self._corpus, name))
        raise LatentsError("unreadable", f"neither {path} nor {_shipped(path)} exists")

    def _numbers(self, dataset: ShardDataset, index: int, camera: str, latents: torch.Tensor) -> Any:
        """Rows of the stored frames; refuses latents that are not of this video."""
        if tuple(latents.shape[1:]) != self._shape:
            raise LatentsError("bad_annotation", f"latents are {tuple(latents.shape)}, not (T, {self._shape})")
        numbers = dataset.source_frames(index, camera)
        last = int(numbers[-1])
        is_whole = dataset.record(index).start_s is None
        most = last + (int(numbers[1] - numbers[0]) if len(numbers) > 1 else 1) if is_whole else len(latents)
        if not last < len(latents) <= most:
            message = (
                f"latents have {len(latents)} frames, the video {last + 1 if is_whole else f'at least {last + 1}'}"
            )
            raise LatentsError("bad_annotation", message)
        return numbers


def read_latents(data: bytes) -> torch.Tensor:
    """The (T, C, h, w) tensor in a `.pt` file's bytes; nothing in it is run. `LatentsError` for anything else."""
    stream = io.BytesIO(data)
    try:
        with zipfile.ZipFile(stream) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_TENSOR_BYTES:
            raise LatentsError("too_large", f"the file unpacks to {unpacked} bytes, more than {MAX_TENSOR_BYTES}")
        stream.seek(0)
        value = torch.load(stream, map_location="cpu", weights_only=True)
    except NOT_A_TENSOR as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LatentsError("bad_annotation", f"not a plain tensor: {reason}") from None
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.dim() != 4 or not len(value):
        raise LatentsError("bad_annotation", f"holds a {type(value).__name__}, not one tensor (T, C, h, w)")
    if value.dtype not in (torch.float32, torch.float16) or value.numel() * value.element_size() > unpacked:
        raise LatentsError("bad_annotation", f"holds {value.dtype} {tuple(value.shape)} in {unpacked} bytes")
    if not torch.isfinite(value).all():
        raise LatentsError("bad_annotation", "holds values that are not finite")
    return value


def _paths(entries: Any, key: str) -> list[str]:
    if not isinstance(entries, list):
        return []
    return [str(entry.get(key) or "") if isinstance(entry, dict) else "" for entry in entries]


def _failure(record: SampleRecord, path: str, error: LatentsError) -> Failure:
    return Failure(
        key=record.key,
        source_id=record.source_id,
        path=path,
        sha256="",
        stage="read",
        reason=error.reason,
        message=error.message,
    )


def _shipped(path: str) -> str:
    """The same file where it was really shipped."""
    return "/".join(SHIPPED_FOLDER if part == STATED_FOLDER else part for part in path.split("/"))


def _stays_inside(path: str) -> bool:
    return not path.startswith("/") and ".." not in path.split("/")


def _header(config: OfficialLatentsConfig, dataset: ShardDataset, text: TokenEncoder) -> CacheManifest:
    vae_digest, inputs = "", [dataset.version]
    if config.vae:
        vae = load_vae(config.vae)
        if not np.isclose(vae.scale, config.scaling_factor, rtol=1e-6):
            raise ConfigError(
                f"the files are scaled by {config.scaling_factor}, the VAE {config.vae} by {vae.scale}.",
                remedy="Name the VAE that made them, or set scaling_factor.",
            )
        vae_digest = vae.digest
        inputs.append(video_digest(config.vae))
    side = config.image_size // PIXELS_PER_LATENT
    return sealed(
        CacheManifest(
            data_version=dataset.version,
            split=config.split,
            vae_digest=vae_digest,
            text_digest=text.digest,
            text=text_identity(config.text),
            text_shape=(config.text.max_tokens, text.dim),
            image_size=config.image_size,
            latent_shape=(LATENT_CHANNELS, side, side),
            scaling_factor=config.scaling_factor,
            posterior="sample",
            dtype=config.dtype,
            recipe={"imported": True},
            inputs=tuple(inputs),
        )
    )


def _check_failures(receipts: list[Receipt], dataset: ShardDataset, config: OfficialLatentsConfig) -> None:
    """Stop before the commit when too many samples have no latents at all."""
    lost = len(dataset) - sum(receipt.num_samples for receipt in receipts)
    if lost <= config.max_failure_share * len(dataset):
        return
    failures = failure_ledger(receipts)
    reason, _ = Counter(failure.reason for failure in failures).most_common(1)[0]
    example = next(failure for failure in failures if failure.reason == reason)
    raise TooManyFailuresError(
        f"{lost} of {len(dataset)} samples have no usable latents in {config.corpus}, more than the allowed share "
        f"{config.max_failure_share:g}; mostly {reason}: {example.source_id} ({example.message}).",
        remedy="Check the corpus folder and use a new output, or raise max_failure_share and run again.",
    )
