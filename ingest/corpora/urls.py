"""A table of addresses, after its downloads: the root is the folder that `ingest.downloads` filled."""

from __future__ import annotations

from typing import Any

from ingest.corpora.folder import read_trajectory
from ingest.download_records import DownloadRow, Outcome, file_path, read_outcomes, read_rows
from ingest.schema import Clip, SourceVideo

__all__ = ["list_clips", "read_trajectory"]


def list_clips(root: str) -> list[Clip]:
    """One clip per row; those whose download failed are refused with its reason and message."""
    outcomes = read_outcomes(root)
    clips = [_clip(row, outcomes.get(row.file)) for row in read_rows(root)]
    return sorted(clips, key=lambda clip: clip.source_id)


def _clip(row: DownloadRow, outcome: Outcome | None) -> Clip:
    metadata = {name: value for name, value in (("address", row.address), ("id", row.id)) if value}
    known: dict[str, Any] = {"text": row.text, "label": row.label, "metadata": metadata}
    if row.problem:
        return Clip(source_id=row.source_id, videos=(), problem=row.problem, **known)
    if outcome is None:
        outcome = Outcome(file=row.file, reason="download_failed", message=f"{row.address} was not fetched yet.")
    path = outcome.path or file_path(row.file, "")
    refused = (outcome.reason, outcome.message) if outcome.reason else None
    return Clip(
        source_id=row.source_id,
        videos=(SourceVideo(path=path),),
        start_s=row.start_s,
        end_s=row.end_s,
        refused=refused,
        **known,
    )
