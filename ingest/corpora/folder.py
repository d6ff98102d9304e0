"""Any folder of videos, and optionally a table at its top: labels.csv, labels.json, labels.jsonl or labels.parquet.

Its columns: `path`, and any of `text` (or `caption`), `label`, `split`, `start_s`, `end_s`. Several rows of one path
with different seconds are several clips, with equal ones several captions of one clip. A row without its video
is in the ledger; a video that the table does not name is a clip too: its text is that of
`NAME.txt` beside `NAME.mp4`, and its label is the name of its folder.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import InputError
from infra.media import VIDEO_SUFFIXES
from infra.storage import join, list_names, read_bytes
from ingest.corpora.tables import TABLE_SUFFIXES, read_table, seconds
from ingest.schema import Clip, SourceVideo

LABELS = tuple(f"labels{suffix}" for suffix in TABLE_SUFFIXES)


def list_clips(root: str) -> list[Clip]:
    """A clip per row of the table and per video without one, recursively; hidden files and folders are left out."""
    names = list_names(root, recursive=True)
    videos = [name for name in names if is_video(name)]
    if not videos:
        expected = ", ".join(VIDEO_SUFFIXES)
        raise InputError(f"{root} holds no video file.", remedy=f"Expected files ending in {expected}.")
    rows = _read_labels(root, [name for name in LABELS if name in names])
    captions = {name for name in names if name.endswith(".txt")}
    clips = [clip for name in videos for clip in _clips(root, name, rows.pop(name, []), captions)]
    clips += [clip for name, left in rows.items() for clip in _clips(root, name, left, captions)]  # the ledger says why
    return sorted(clips, key=lambda clip: clip.source_id)


def read_trajectory(root: str, clip: Clip) -> dict[str, npt.NDArray[np.generic]]:
    """Videos alone have no trajectories."""
    raise InputError(f"{clip.source_id} in {root} has no trajectory.")


def is_video(name: str) -> bool:
    """Whether a relative path claims to be a video by its suffix."""
    path = PurePosixPath(name)
    return path.suffix.lower() in VIDEO_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _clips(root: str, name: str, rows: list[dict[str, str]], captions: set[str]) -> list[Clip]:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts:
        return [Clip(source_id=name or "(empty path)", videos=(), problem=f"its row has the path {name!r}")]
    video = (SourceVideo(path=name),)
    if not rows:
        text, problem = _caption(root, str(PurePosixPath(name).with_suffix(".txt")), captions)
        return [Clip(source_id=name, videos=video, text=text, label=PurePosixPath(name).parent.name, problem=problem)]
    spans: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        spans[_span(row)].append(row)
    return [_clip(name, video, span, same) for span, same in spans.items()]


def _clip(name: str, video: tuple[SourceVideo, ...], span: tuple[str, str], rows: list[dict[str, str]]) -> Clip:
    """The clip of the rows of one span: the first gives its words, all of their words are kept beside it."""
    row = rows[0]
    texts = [text for row in rows if (text := row.get("text") or row.get("caption") or "")]
    metadata: dict[str, Any] = {"texts": texts} if len(texts) > 1 else {}
    return Clip(
        # A row without seconds is the whole video and keeps its name.
        source_id=name if span == ("", "") else f"{name}@{span[0] or 0}-{span[1] or 'end'}",
        videos=video,
        text=texts[0] if texts else "",
        label=row.get("label", ""),
        metadata=metadata | ({"source_split": row["split"]} if row.get("split") else {}),
        **_seconds(row),
    )


def _caption(root: str, place: str, captions: set[str]) -> tuple[str, str]:
    """(text, what is wrong with it)."""
    if place not in captions:
        return "", ""
    try:
        return read_bytes(join(root, place)).decode().strip(), ""
    except UnicodeDecodeError:
        return "", f"{place} is not UTF-8 text"


def _span(row: dict[str, str]) -> tuple[str, str]:
    said = (row.get("start_s", "").strip(), row.get("end_s", "").strip())
    if seconds(said[0]) == 0:
        return "", said[1]  # "0", "0.0" and nothing are one start
    return said


def _seconds(row: dict[str, str]) -> dict[str, Any]:
    """The clip's fields for its seconds, or for what is wrong with them."""
    said = _span(row)
    values = [None if text == "" else seconds(text) for text in said]
    start, end = values
    if any(text and value is None for text, value in zip(said, values, strict=True)) or (start or 0) >= (end or 1e12):
        return {"problem": f"its row has start_s {said[0]!r} and end_s {said[1]!r}: no span of a video"}
    return {"start_s": start, "end_s": end}


def _read_labels(root: str, tables: list[str]) -> dict[str, list[dict[str, str]]]:
    if len(tables) > 1:
        raise InputError(f"{root} holds {' and '.join(tables)}.", remedy="Keep one of them.")
    rows_of: dict[str, list[dict[str, str]]] = defaultdict(list)
    for table in tables:
        columns, rows = read_table(join(root, table))
        if "path" not in columns:
            raise InputError(
                f"{join(root, table)} has no column 'path'.",
                remedy="Columns: path, text, label, split, start_s, end_s.",
            )
        for row in rows:
            rows_of[row["path"]].append(row)
    return rows_of
