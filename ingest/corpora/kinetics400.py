"""Kinetics-400, as downloads of it lie on disks: class folders, or the published CSV beside files of any arrangement.

    [SPLIT/]CLASS/NAME.mp4                        cut clips in class folders; `_` in a class stands for a blank
    ANY.csv + .../ID_000012_000022.mp4            label,youtube_id,time_start,time_end[,split,...]: cut clips
    ANY.csv + .../ID.mp4                          the same rows, whole videos: the row's seconds are taken of them

A row without a file is listed too: Kinetics loses videos every year, and the ledger says which are gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from infra.errors import InputError
from infra.storage import join, list_names
from ingest.corpora.folder import is_video, read_trajectory
from ingest.corpora.tables import read_table, seconds
from ingest.schema import Clip, SourceVideo

__all__ = ["list_clips", "read_trajectory"]

PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a video; it becomes part of a path
COLUMNS = ("label", "youtube_id", "time_start", "time_end")
SPLITS = ("train", "val", "validate", "validation", "test")


def list_clips(root: str) -> list[Clip]:
    """One clip per row of the CSVs, or per video in a class folder where there is no CSV."""
    names = list_names(root, recursive=True)
    videos = [name for name in names if is_video(name)]
    tables = [name for name in names if name.endswith(".csv")]
    if tables:
        found = [clip for table in tables for clip in _rows(root, table, videos)]
    else:
        found = [_in_class_folder(name) for name in videos]
    if not any(clip.label for clip in found):
        raise InputError(
            f"{root} is not laid out like Kinetics-400.",
            remedy=f"Expected [SPLIT/]CLASS/NAME.mp4, or a CSV with columns {', '.join(COLUMNS)}.",
        )
    return sorted({clip.source_id: clip for clip in found}.values(), key=lambda clip: clip.source_id)


def _in_class_folder(name: str) -> Clip:
    parts = PurePosixPath(name).parts
    if len(parts) < 2:
        return Clip(source_id=name, videos=(SourceVideo(path=name),), problem="it lies in no class folder")
    label = parts[-2].replace("_", " ")
    split = next((part for part in parts[:-2] if part in SPLITS), "")
    metadata = {"source_split": split} if split else {}
    return Clip(source_id=name, videos=(SourceVideo(path=name),), text=label, label=label, metadata=metadata)


def _rows(root: str, table: str, videos: list[str]) -> Iterator[Clip]:
    columns, rows = read_table(join(root, table))
    if not set(COLUMNS) <= set(columns):
        raise InputError(
            f"{join(root, table)} has columns {', '.join(columns) or 'none'}.",
            remedy=f"Kinetics' annotations have {', '.join(COLUMNS)}; put other tables elsewhere.",
        )
    by_stem = {PurePosixPath(name).stem: name for name in videos}
    for row in rows:
        yield _of_row(row, table, by_stem)


def _of_row(row: dict[str, str], table: str, by_stem: dict[str, str]) -> Clip:
    label, video = row["label"].strip(), row["youtube_id"].strip()
    split = (row.get("split") or PurePosixPath(table).stem).strip()
    known: dict[str, Any] = {"text": label, "label": label, "metadata": {"youtube_id": video, "source_split": split}}
    start, end = seconds(row["time_start"]), seconds(row["time_end"])
    if start is None or end is None or start >= end or not PLAIN_NAME.fullmatch(video):
        said = f"{video!r}, seconds {row['time_start']!r} to {row['time_end']!r}"
        source_id = f"{video}_{row['time_start']}_{row['time_end']}"
        return Clip(source_id=source_id, videos=(), problem=f"{table} has a row of {said}: no video's span", **known)
    stem = f"{video}_{round(start):06d}_{round(end):06d}"
    if (cut := by_stem.get(stem)) is not None:
        return Clip(source_id=stem, videos=(SourceVideo(path=cut),), **known)
    whole = by_stem.get(video)
    span: dict[str, Any] = {"start_s": start, "end_s": end} if whole else {}
    return Clip(source_id=stem, videos=(SourceVideo(path=whole or f"{stem}.mp4"),), **span, **known)
