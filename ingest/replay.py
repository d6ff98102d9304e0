"""Another try at what failed: the clips in a data set's ledger become a child data set of their own."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from infra.digests import short
from infra.errors import InputError
from infra.storage import exists, join, read_json
from ingest.reader import load_manifest
from ingest.receipt import failure_ledger
from ingest.schema import DECISIONS, PLAN_NAME, Clip
from ingest.splits import Split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replay:
    """What a child data set needs to know of its parent.

    `failed` are source ids, `built` the keys of samples that the parent holds, `splits` what its plan drew: a clip held
    out there is held out here, and one that was refused before any draw is for training.
    """

    url: str
    version: str
    failed: frozenset[str]
    built: frozenset[str]
    splits: dict[str, Split]

    def choose(self, clips: list[Clip]) -> list[Clip]:
        """Those of the clips that failed in the parent. Raises `InputError` where none is there."""
        found = [clip for clip in clips if clip.source_id in self.failed]
        missing = sorted(self.failed - {clip.source_id for clip in found})
        if not found:
            raise InputError(
                f"none of {len(self.failed)} clips that failed in {self.url} is in the source, e.g. {missing[0]!r}.",
                remedy="Give the corpus that the data set was made of.",
            )
        if missing:  # a mended annotation explains a video that stood alone, for one
            log.warning("%d clips that failed in %s are in the source no more: %r", len(missing), self.url, missing[0])
        return found


def read_parent(url: str, *, corpus: str) -> Replay:
    """What failed in a data set, and what did not. Raises `InputError` where nothing did."""
    manifest, version = load_manifest(url)
    if manifest.corpus != corpus:
        raise InputError(f"{url} is of corpus {manifest.corpus!r}, not {corpus!r}.")
    ledger = failure_ledger(manifest.receipts)
    failed = {item.source_id for item in ledger if item.reason not in DECISIONS}
    if not failed:
        raise InputError(f"{url} (version {short(version)}) has no failures to replay.")
    place = join(url, PLAN_NAME)
    planned = [clip for shard in read_json(place)["shards"] for clip in shard["clips"]] if exists(place) else []
    refused = {item.key for item in ledger}
    return Replay(
        url=url,
        version=version,
        failed=frozenset(failed),
        built=frozenset(clip["key"] for clip in planned if clip["key"] not in refused),
        splits={clip["clip"]["source_id"]: clip["split"] for clip in planned},
    )
