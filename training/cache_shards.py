"""Writing latent caches: one shard per data set shard, committed by receipt, the manifest last. Resumes by itself.

What a sample's moments come from is a `Fill`: a VAE over its frames, or files that somebody published. Shape letters:
T frames, C latent channels, h and w latent height and width, L tokens, D width of a text state.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from infra.digests import pretty_json, sha256_bytes, sha256_json, short
from infra.errors import DataError
from infra.faults import fault_point
from infra.storage import create_only, exists, is_remote, join, read_bytes, write_json
from ingest.reader import MANIFEST_NAME, ShardDataset
from ingest.receipt import committed_shards, failure_ledger, publish_shard, read_receipt, sweep_workspaces, workspace
from ingest.schema import Failure, Receipt, shard_name
from ingest.shard import Member, ShardSummary, ShardWriter
from training.cache import TEXT_SUFFIX, CachedSample, CacheManifest, moments_suffix, pack_npy
from training.models.common.text import TokenEncoder

log = logging.getLogger(__name__)

STAGE = "cache"  # of the fault points
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Filled:
    """A sample's moments (T, 2, C, h, w) by camera, unscaled; what could not be had is in `failures`."""

    moments: Mapping[str, Floats]
    failures: tuple[Failure, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)  # camera -> sha256 of the file it was read from


Fill = Callable[[ShardDataset, int], Filled]


ManifestT = TypeVar("ManifestT", bound=Any)  # a cache's manifest: a `Config` with kind, plan_id, receipts and counts


class ShardFiller:
    """Builds and commits cache shards; the same in this process and in an actor."""

    def __init__(
        self,
        header: CacheManifest,
        output: str,
        *,
        dataset: ShardDataset,
        fill: Fill,
        text: TokenEncoder,
        engine: dict[str, str],
    ) -> None:
        self.header = header
        self.output = output
        self._dataset, self._fill, self._text = dataset, fill, text
        self._engine = engine
        self._samples = samples_of_shards(dataset)

    def build(self, shard: int) -> Receipt:
        """Build one shard and commit it; returns its receipt."""
        started = time.monotonic()
        failures: list[Failure] = []
        num_frames = 0
        with steady_arithmetic(), workspace(self.output, shard) as folder:
            tar = folder / f"{shard_name(shard)}.tar"
            with ShardWriter(tar) as writer:
                for index in self._samples[shard]:
                    filled = self._fill(self._dataset, index)
                    failures += filled.failures
                    num_frames += sum(len(moments) for moments in filled.moments.values())
                    if filled.moments:
                        writer.add(self._dataset.key(index), self._members(index, filled))
                    fault_point(f"{STAGE}.after_sample")
            summary = writer.close()
            receipt = publish_filled(
                self.output, self.header, shard, tar, summary,
                num_frames=num_frames, failures=tuple(failures), engine=self._engine,
            )  # fmt: skip
        write_log(self.output, receipt, seconds=time.monotonic() - started)
        return receipt

    def _members(self, index: int, filled: Filled) -> list[Member]:
        key, text = self._dataset.key(index), self._dataset.text(index)
        record = CachedSample(
            key=key,
            source_id=self._dataset.record(index).source_id,
            text=text,
            cameras={camera: len(moments) for camera, moments in filled.moments.items()},
            sources=dict(filled.sources),
        )
        members = [Member("json", pretty_json(record.to_json()))]
        for camera, moments in filled.moments.items():
            if moments.shape[1:] != (2, *self.header.latent_shape):
                raise DataError(f"{key}: latents of {camera!r} are {moments.shape}, not {self.header.latent_shape}.")
            members.append(Member(moments_suffix(camera), pack_npy(self._stored(moments, f"{key} ({camera})"))))
        states = self._text.encode([text])[0].numpy().astype(np.float32)
        return [*members, Member(TEXT_SUFFIX, pack_npy(states))]

    def _stored(self, moments: Floats, where: str) -> npt.NDArray[Any]:
        with np.errstate(over="ignore"):  # reported below
            stored = moments.astype(self.header.dtype)
        if not np.isfinite(stored).all():
            raise DataError(
                f"{where}: its latents are not finite in {self.header.dtype}.",
                remedy="Use dtype=float32; if that fails too, the VAE's weights are damaged.",
            )
        return stored


def publish_filled(
    output: str, header: Any, shard: int, tar: Path, summary: ShardSummary, *, num_frames: int, **facts: Any
) -> Receipt:
    """Commit one finished shard of the cache with that manifest; returns its receipt. `facts`: failures and engine."""
    receipt = Receipt(
        shard=shard,
        plan_id=header.plan_id,
        tar_sha256=summary.tar_sha256,
        idx_sha256=summary.idx_sha256,
        tar_bytes=summary.tar_bytes,
        num_samples=summary.num_samples,
        num_frames=num_frames,
        num_members=summary.num_members,
        **facts,
    )
    publish_shard(tar, output, receipt, stage=STAGE)
    return receipt


def samples_of_shards(dataset: ShardDataset) -> dict[int, range]:
    """Shard number -> indices of this view in it; shards without any are left out."""
    found, start = {}, 0
    for receipt, count in zip(dataset.manifest.receipts, dataset.shard_sizes, strict=True):
        if count:
            found[receipt.shard] = range(start, start + count)
        start += count
    return found


@contextlib.contextmanager
def steady_arithmetic() -> Iterator[None]:
    """float32 that does not depend on how many threads, or which matmul library, this process was given."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def sealed(header: ManifestT) -> ManifestT:
    """The header with its plan id: a digest of everything that decides the cache's bytes."""
    identity = header.to_json() | {"plan_id": ""}
    return header.model_copy(update={"plan_id": sha256_json(identity)})


def fill_cache(
    header: ManifestT,
    output: str,
    shards: Iterable[int],
    build: Callable[[list[int]], Iterator[Receipt]],
    *,
    load: Callable[[str], tuple[ManifestT, str]],
    accept: Callable[[list[Receipt]], None] | None = None,
) -> tuple[ManifestT, str]:
    """Build what is missing and commit the manifest; (manifest, version). A finished cache is left alone.

    `build` yields the receipts of the shards it is given, in any order; `accept` may refuse all of them; `load` reads
    the manifest of a finished cache. Raises `DataError` when `output` holds another cache.
    """
    if exists(join(output, MANIFEST_NAME)):
        manifest, version = load(output)
        _check_same(header, manifest, output)
        _sweep(output)
        log.info("%s is complete (%d samples): nothing to do", output, manifest.num_samples)
        return manifest, version
    _sweep(output)
    planned, committed = sorted(shards), set(committed_shards(output))
    receipts = [read_receipt(output, shard, plan_id=header.plan_id) for shard in planned if shard in committed]
    if receipts:
        log.info("resuming: %d of %d shards are committed", len(receipts), len(planned))
    for receipt in build([shard for shard in planned if shard not in committed]):
        receipts.append(receipt)
        log.info("shard %d committed (%d of %d)", receipt.shard, len(receipts), len(planned))
    if accept is not None:
        accept(receipts)
    result = _commit(header, sorted(receipts, key=lambda receipt: receipt.shard), output)
    _sweep(output)
    return result


def _commit(header: ManifestT, receipts: list[Receipt], output: str) -> tuple[ManifestT, str]:
    manifest = header.model_copy(
        update={
            "receipts": tuple(receipts),
            "num_samples": sum(receipt.num_samples for receipt in receipts),
            "num_frames": sum(receipt.num_frames for receipt in receipts),
            "num_failures": len(failure_ledger(receipts)),
        }
    )
    data = pretty_json(manifest.to_json())
    place = join(output, MANIFEST_NAME)
    fault_point(f"{STAGE}.before_manifest")
    if not create_only(place, data) and read_bytes(place) != data:
        raise DataError(f"{place} exists with other content.", remedy="Was a shard's file edited? Use a new output.")
    fault_point(f"{STAGE}.after_manifest")
    return manifest, sha256_bytes(data)


def _check_same(header: ManifestT, found: ManifestT, output: str) -> None:
    if header.plan_id == found.plan_id:
        return
    asked, stored = header.to_json(), found.to_json()
    left_out = {"plan_id", "receipts", "num_samples", "num_frames", "num_failures", "inputs"}
    differing = [name for name in asked if name not in left_out and asked[name] != stored[name]]
    name = differing[0] if differing else "inputs"
    before, now = _shown(stored[name]), _shown(asked[name])
    raise DataError(
        f"{output} already holds a {header.kind.replace('-', ' ')} with {name} {before}, asked for is {now}.",
        remedy="Give each cache its own output.",
    )


def _shown(value: Any) -> str:
    return short(value) if isinstance(value, str) and len(value) == 64 else repr(value)


def _sweep(output: str) -> None:
    if not is_remote(output):
        sweep_workspaces(output)


def write_log(output: str, receipt: Receipt, *, seconds: float) -> None:
    """What differs from run to run: beside the receipt, hashed by nothing."""
    record = {
        "host": socket.gethostname(),
        "finished_unix_s": round(time.time(), 3),
        "seconds": round(seconds, 3),
        "seconds_per_frame": round(seconds / max(receipt.num_frames, 1), 6),
    }
    write_json(join(output, f"{shard_name(receipt.shard)}.log.json"), record)
