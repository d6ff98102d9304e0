"""Another try at what failed: the clips in a data set's ledger become a child data set of their own."""

from __future__ import annotations

import logging

from infra.digests import short
from infra.errors import InputError
from ingest.reader import load_manifest
from ingest.receipt import failure_ledger
from ingest.schema import DECISIONS, Clip

log = logging.getLogger(__name__)


def failed_sources(parent: str, *, corpus: str) -> tuple[frozenset[str], str]:
    """(source ids of what failed in the data set `parent`, its version). Raises `InputError` where nothing did."""
    manifest, version = load_manifest(parent)
    if manifest.corpus != corpus:
        raise InputError(f"{parent} is of corpus {manifest.corpus!r}, not {corpus!r}.")
    failed = {item.source_id for item in failure_ledger(manifest.receipts) if item.reason not in DECISIONS}
    if not failed:
        raise InputError(f"{parent} (version {short(version)}) has no failures to replay.")
    return frozenset(failed), version


def failed_clips(clips: list[Clip], parent: str, *, corpus: str) -> tuple[list[Clip], str]:
    """(those of the clips that failed in the data set `parent`, its version). Raises `InputError`."""
    failed, version = failed_sources(parent, corpus=corpus)
    found = [clip for clip in clips if clip.source_id in failed]
    missing = sorted(failed - {clip.source_id for clip in found})
    if not found:
        raise InputError(
            f"none of the {len(failed)} clips that failed in {parent} is in the source, e.g. {missing[0]!r}.",
            remedy="Give the corpus that the data set was made of.",
        )
    if missing:  # a mended annotation explains a video that stood alone, for one
        log.warning(
            "%d clips that failed in %s are not in the source any more, first %r", len(missing), parent, missing[0]
        )
    return found, version
