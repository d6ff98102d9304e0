"""Any folder of videos. Optional `labels.csv` at its top: columns `path`, `text`, `label`, one line a video.

Without it the text is that of `NAME.txt` beside `NAME.mp4`, and the label is the name of the video's folder.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from infra.errors import InputError
from infra.media import VIDEO_SUFFIXES
from infra.storage import join, list_names, read_bytes
from ingest.corpora.tables import read_table
from ingest.schema import Clip, SourceVideo

LABELS = "labels.csv"


def list_clips(root: str) -> list[Clip]:
    """One clip per video file, recursively; hidden files and folders are left out."""
    names = list_names(root, recursive=True)
    videos = [name for name in names if is_video(name)]
    if not videos:
        expected = ", ".join(VIDEO_SUFFIXES)
        raise InputError(f"{root} holds no video file.", remedy=f"Expected files ending in {expected}.")
    labels = _read_labels(root) if LABELS in names else {}
    unknown = sorted(set(labels) - set(videos))
    if unknown:
        raise InputError(f"{join(root, LABELS)} names {unknown[0]!r}, which is no video of that folder.")
    captions = {name for name in names if name.endswith(".txt")}
    return [_clip(root, name, labels, captions) for name in videos]


def read_trajectory(root: str, clip: Clip) -> dict[str, npt.NDArray[np.generic]]:
    """Videos alone have no trajectories."""
    raise InputError(f"{clip.source_id} in {root} has no trajectory.")


def is_video(name: str) -> bool:
    """Whether a relative path claims to be a video by its suffix."""
    path = PurePosixPath(name)
    return path.suffix.lower() in VIDEO_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _clip(root: str, name: str, labels: dict[str, dict[str, str]], captions: set[str]) -> Clip:
    row = labels.get(name)
    caption = str(PurePosixPath(name).with_suffix(".txt"))
    problem, text = "", ""
    if row is not None:
        text = row.get("text") or ""
    elif caption in captions:
        try:
            text = read_bytes(join(root, caption)).decode().strip()
        except UnicodeDecodeError:
            problem = f"{caption} is not UTF-8 text"
    parent = PurePosixPath(name).parent.name
    label = (row.get("label") or "") if row is not None else parent
    return Clip(source_id=name, videos=(SourceVideo(path=name),), text=text, label=label, problem=problem)


def _read_labels(root: str) -> dict[str, dict[str, str]]:
    place = join(root, LABELS)
    columns, rows = read_table(place)
    if "path" not in columns:
        raise InputError(f"{place} has no column 'path'.", remedy="Its first line must be: path,text,label")
    return {row["path"]: row for row in rows}
