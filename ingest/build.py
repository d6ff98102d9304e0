"""Building one shard, so that a crash at any instant costs only the work since the last receipt.

Shard bytes are a function of the plan and the engine's versions. The order of a commit is tar, index, receipt, and the
receipt is create-only: what has no receipt does not exist, and two workers on one shard write the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from infra.faults import fault_point
from infra.media_transcode import engine_fingerprint
from infra.storage import join, write_json
from ingest.attempts import attempt_at
from ingest.isolate import transcode_here, transcode_isolated
from ingest.plan import PlannedShard
from ingest.reader import default_cache
from ingest.receipt import publish_shard, workspace
from ingest.recipe import IngestConfig
from ingest.sample import ClipError, Encode, Workshop, build_sample
from ingest.schema import Failure, Receipt, SampleRecord, shard_name
from ingest.shard import ShardSummary, ShardWriter
from ingest.watchdog import deadline

log = logging.getLogger(__name__)


def build_shard(planned: PlannedShard, config: IngestConfig, *, plan_id: str, run_id: str, node: str = "") -> Receipt:
    """Build and commit one shard; returns its receipt. `node` is for the log only.

    If an earlier attempt at it died, the source that it was decoding is decoded in a limited child this time; after
    several deaths, or where the mark does not tell, every source is. Raises `ServiceError` when several attempts of
    this run died.
    """
    started = time.monotonic()
    with attempt_at(config.output, planned.shard, run_id) as attempt, workspace(config.output, planned.shard) as folder:
        encoders = {isolated: _encoder(config, isolated=isolated) for isolated in (False, True)}
        shop = Workshop(config.source, config.corpus, config.recipe, default_cache())
        tar = folder / f"{shard_name(planned.shard)}.tar"
        summary, tally, seconds = _write_tar(tar, planned, shop, lambda clip: encoders[attempt.begin(clip)])
        receipt = Receipt(
            shard=planned.shard,
            plan_id=plan_id,
            tar_sha256=summary.tar_sha256,
            idx_sha256=summary.idx_sha256,
            tar_bytes=summary.tar_bytes,
            num_samples=summary.num_samples,
            num_frames=tally.num_frames,
            num_members=summary.num_members,
            failures=tuple(
                sorted((*planned.failures, *tally.failures), key=lambda failure: (failure.source_id, failure.key))
            ),
            engine=engine_fingerprint(config.recipe.engine),
            statistics=tally.statistics(),
        )
        with _clocked(shop.seconds, "commit"):
            publish_shard(tar, config.output, receipt, stage="ingest")
    stages = {name: round(value, 4) for name, value in sorted(shop.seconds.items())}
    times = {
        "node": node,
        "seconds": round(time.monotonic() - started, 3),
        "stages": stages,
        "seconds_per_clip": seconds,
    }
    _write_log(config.output, receipt, attempt=attempt.number, times=times)
    return receipt


class Tally:
    """What a shard's samples add up to."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.num_frames = 0
        self._counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("size", "fps", "length", "label", "split")
        }
        self._milliseconds = 0

    def add(self, record: SampleRecord) -> None:
        """Count one sample."""
        for camera in record.cameras.values():
            self.num_frames += camera.num_frames
            self._counts["size"][f"{camera.width}x{camera.height}"] += 1
            self._counts["fps"][f"{camera.fps:g}"] += 1
            self._counts["length"][camera.length] += 1
        camera = next(iter(record.cameras.values()))
        self._milliseconds += round(1000 * camera.num_frames / camera.fps)
        self._counts["label"][record.label] += 1
        self._counts["split"][str(record.metadata["split"])] += 1

    def statistics(self) -> dict[str, Any]:
        """Integers only, so that their sum over shards is exact."""
        counts = {name: dict(sorted(counter.items())) for name, counter in self._counts.items()}
        return {"milliseconds": self._milliseconds, **counts}


def _write_tar(
    tar: Path, planned: PlannedShard, shop: Workshop, encoder_of: Callable[[str], Encode]
) -> tuple[ShardSummary, Tally, dict[str, float]]:
    tally, seconds = Tally(), dict[str, float]()
    with ShardWriter(tar) as writer:
        for clip in planned.clips:
            started = time.monotonic()
            encode = encoder_of(clip.clip.source_id)
            try:
                record, members = build_sample(clip, shop, encode)
            except ClipError as error:
                tally.failures.append(error.failure)
                log.info("%s refused: %s (%s)", clip.clip.source_id, error.failure.reason, error.failure.message)
            else:
                with _clocked(shop.seconds, "write"):
                    writer.add(clip.key, members)
                tally.add(record)
            seconds[clip.key] = round(time.monotonic() - started, 4)
            fault_point("ingest.after_clip")
        with _clocked(shop.seconds, "write"):
            summary = writer.close()
    return summary, tally, seconds


@contextlib.contextmanager
def _clocked(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - started


def _encoder(config: IngestConfig, *, isolated: bool) -> Encode:
    settings, recipe = config.recipe.transcoding(), config.recipe
    if isolated:
        return lambda path, span: transcode_isolated(path, settings, span, memory_bytes=recipe.item_memory_bytes)
    return partial(_encode_watched, settings=settings, timeout_s=recipe.item_timeout_s)


def _encode_watched(path: Path, span: Any, *, settings: Any, timeout_s: float) -> Any:
    with deadline(timeout_s):
        return transcode_here(path, settings, span)


def _write_log(output: str, receipt: Receipt, *, attempt: int, times: dict[str, Any]) -> None:
    """What differs from run to run: beside the receipt, hashed by nothing."""
    record = {"attempt": attempt, "host": socket.gethostname(), "finished_unix_s": round(time.time(), 3), **times}
    write_json(join(output, f"{shard_name(receipt.shard)}.log.json"), record)
