"""Attempts at a shard: who died before, over which source, and whom to decode in a child because of it."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ServiceError
from infra.storage import create_only, is_remote, join, list_names, remove
from ingest.receipt import sweep_workspaces
from ingest.schema import shard_name

log = logging.getLogger(__name__)

ATTEMPTS = "attempts"
MAX_DEAD_ATTEMPTS = 4  # of one run at one shard
MAX_NAMED_DEATHS = 2  # after more, no clip of the shard is trusted


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


@contextlib.contextmanager
def attempt_at(output: str, shard: int, run_id: str) -> Iterator[Attempt]:
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
        log.warning(
            "%s: %d earlier attempt(s) died (or still run); in a child: %s", shard_name(shard), len(marks), whom
        )
    try:
        yield Attempt(mine, len(marks), suspects)
    finally:
        remove(mine)
    for name in marks:
        remove(join(output, ATTEMPTS, name))


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


def _suspects(marks: list[str]) -> frozenset[str] | None:
    """The sources that dead attempts were decoding; None where a mark does not tell, or there were too many deaths."""
    if len(marks) > MAX_NAMED_DEATHS or any(is_remote(mark) for mark in marks):
        return None
    found = set()
    for mark in marks:
        with contextlib.suppress(FileNotFoundError):  # another builder of the shard has finished
            found.add(Path(mark).read_text())
    return frozenset(found - {""})
