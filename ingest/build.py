"""Building one shard, so that a crash at any instant costs only the work since the last receipt.

Shard bytes are a function of the plan and the engine's versions. The order of a commit is tar, index, receipt, and the
receipt is create-only: what has no receipt does not exist, and two workers on one shard write the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from infra.errors import ServiceError
from infra.faults import fault_point
from infra.media_transcode import engine_fingerprint
from infra.storage import create_only, is_remote, join, list_names, remove, write_json
from ingest.isolate import transcode_here, transcode_isolated
from ingest.plan import PlannedShard
from ingest.receipt import publish_shard, sweep_workspaces, workspace
from ingest.recipe import IngestConfig
from ingest.sample import ClipError, Encode, build_sample
from ingest.schema import Failure, Receipt, SampleRecord, shard_name
from ingest.shard import ShardSummary, ShardWriter
from ingest.watchdog import deadline

log = logging.getLogger(__name__)

ATTEMPTS = "attempts"
MAX_DEAD_ATTEMPTS = 4  # of one run at one shard
MAX_NAMED_DEATHS = 2  # after more, no clip of the shard is trusted


def build_shard(planned: PlannedShard, config: IngestConfig, *, plan_id: str, run_id: str) -> Receipt:
    """Build and commit one shard; returns its receipt.

    If an earlier attempt at it died, the source that it was decoding is decoded in a limited child this time; after
    several deaths, or where the mark does not tell, every source is. Raises `ServiceError` when several attempts of
    this run died.
    """
    started = time.monotonic()
    with _attempt(config.output, planned.shard, run_id) as attempt, workspace(config.output, planned.shard) as folder:
        tar = folder / f"{shard_name(planned.shard)}.tar"
        summary, tally, seconds = _write_tar(tar, planned, config, attempt)
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
        publish_shard(tar, config.output, receipt, stage="ingest")
    _write_log(config.output, receipt, attempt=attempt.number, started=started, seconds=seconds)
    return receipt


@dataclass(frozen=True)
class Attempt:
    """One attempt at a shard. Its mark holds the source in work, so that a death names it.

    An object store would charge a request for each clip, so there the mark says nothing, and every source is suspect.
    """

    mark: str
    number: int = 0  # attempts that died before
    suspects: frozenset[str] | None = frozenset()  # source ids; None for all

    def begin(self, source_id: str) -> bool:
        """Note the source; True if it is to be decoded in a child."""
        if not is_remote(self.mark):
            Path(self.mark).write_text(source_id)  # not synced: it has to outlive this process, not the machine
        return self.suspects is None or source_id in self.suspects


class Tally:
    """What a shard's samples add up to."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.num_frames = 0
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in ("size", "fps", "label", "split")}
        self._milliseconds = 0

    def add(self, record: SampleRecord) -> None:
        """Count one sample."""
        for camera in record.cameras.values():
            self.num_frames += camera.num_frames
            self._counts["size"][f"{camera.width}x{camera.height}"] += 1
            self._counts["fps"][f"{camera.fps:g}"] += 1
        camera = next(iter(record.cameras.values()))
        self._milliseconds += round(1000 * camera.num_frames / camera.fps)
        self._counts["label"][record.label] += 1
        self._counts["split"][str(record.metadata["split"])] += 1

    def statistics(self) -> dict[str, Any]:
        """Integers only, so that their sum over shards is exact."""
        counts = {name: dict(sorted(counter.items())) for name, counter in self._counts.items()}
        return {"milliseconds": self._milliseconds, **counts}


def _write_tar(
    tar: Path, planned: PlannedShard, config: IngestConfig, attempt: Attempt
) -> tuple[ShardSummary, Tally, dict[str, float]]:
    tally, seconds = Tally(), dict[str, float]()
    encoders = {isolated: _encoder(config, isolated=isolated) for isolated in (False, True)}
    with ShardWriter(tar) as writer:
        for clip in planned.clips:
            started = time.monotonic()
            encode = encoders[attempt.begin(clip.clip.source_id)]
            try:
                record, members = build_sample(
                    clip, root=config.source, corpus=config.corpus, layout=config.recipe.layout, encode=encode
                )
            except ClipError as error:
                tally.failures.append(error.failure)
                log.info("%s refused: %s (%s)", clip.clip.source_id, error.failure.reason, error.failure.message)
            else:
                writer.add(clip.key, members)
                tally.add(record)
            seconds[clip.key] = round(time.monotonic() - started, 4)
            fault_point("ingest.after_clip")
    return writer.close(), tally, seconds


def _encoder(config: IngestConfig, *, isolated: bool) -> Encode:
    settings, recipe = config.recipe.transcoding(), config.recipe
    if isolated:
        return lambda path, span: transcode_isolated(path, settings, span, memory_bytes=recipe.item_memory_bytes)
    return partial(_encode_watched, settings=settings, timeout_s=recipe.item_timeout_s)


def _encode_watched(path: Path, span: Any, *, settings: Any, timeout_s: float) -> Any:
    with deadline(timeout_s):
        return transcode_here(path, settings, span)


@contextlib.contextmanager
def _attempt(output: str, shard: int, run_id: str) -> Iterator[Attempt]:
    """What the attempts that died before left to know; this one leaves its mark unless it ends by itself."""
    stem = f"{shard_name(shard)}."
    marks = [name for name in list_names(join(output, ATTEMPTS)) if name.startswith(stem)]
    if sum(name.startswith(f"{stem}{run_id}.") for name in marks) >= MAX_DEAD_ATTEMPTS:
        raise ServiceError(
            f"{shard_name(shard)}: {MAX_DEAD_ATTEMPTS} workers died building it, though each video had its own child.",
            remedy="Look for memory or disk running out on the workers, then run again.",
        )
    mine = join(output, ATTEMPTS, f"{stem}{run_id}.{uuid.uuid4().hex[:8]}")
    suspects = _suspects([join(output, ATTEMPTS, name) for name in marks])
    create_only(mine, b"")
    if marks:
        whom = "all videos" if suspects is None else ", ".join(sorted(suspects)) or "none of its videos"
        log.warning("%s: %d earlier attempt(s) died; in a child: %s", shard_name(shard), len(marks), whom)
    try:
        yield Attempt(mine, len(marks), suspects)
    finally:
        remove(mine)
    for name in marks:
        remove(join(output, ATTEMPTS, name))


def _suspects(marks: list[str]) -> frozenset[str] | None:
    """The sources that dead attempts were decoding; None where a mark does not tell, or there were too many deaths."""
    if len(marks) > MAX_NAMED_DEATHS or any(is_remote(mark) for mark in marks):
        return None
    found = set()
    for mark in marks:
        with contextlib.suppress(FileNotFoundError):  # another builder of the shard has finished
            found.add(Path(mark).read_text())
    return frozenset(found - {""})


def sweep(output: str, *, complete: bool) -> None:
    """Remove what dead builders of this machine left behind; with `complete`, every mark of an attempt as well."""
    if complete:
        for name in list_names(join(output, ATTEMPTS)):
            remove(join(output, ATTEMPTS, name))
    if is_remote(output):
        return
    sweep_workspaces(output)
    with contextlib.suppress(OSError):  # in use, or not there
        (Path(output) / ATTEMPTS).rmdir()


def _write_log(output: str, receipt: Receipt, *, attempt: int, started: float, seconds: dict[str, float]) -> None:
    """What differs from run to run: beside the receipt, hashed by nothing."""
    record = {
        "attempt": attempt,
        "host": socket.gethostname(),
        "finished_unix_s": round(time.time(), 3),
        "seconds": round(time.monotonic() - started, 3),
        "seconds_per_clip": seconds,
    }
    write_json(join(output, f"{shard_name(receipt.shard)}.log.json"), record)
