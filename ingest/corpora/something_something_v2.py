"""Something-Something v2: `ID.webm` anywhere below the root, and the published label files beside them.

A label file is a JSON list of `{"id", "label", "template", "placeholders"}`; a test split's have only `id`.
The sentence is `label`, the class is `template` without its brackets. The split is told by the file's name.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from infra.errors import InputError
from infra.storage import join, list_names, read_json
from ingest.corpora.folder import is_video, read_trajectory
from ingest.schema import Clip, SourceVideo

__all__ = ["list_clips", "read_trajectory"]

PLAIN_NAME = re.compile(r"[0-9A-Za-z_-]+")  # of a video; it becomes part of a path
SPLITS = ("train", "validation", "test")


def list_clips(root: str) -> list[Clip]:
    """One clip per labelled id, and one, refused, for every video that no label file names."""
    names = list_names(root, recursive=True)
    entries: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names:
        if (split := _split_of(name)) is not None:
            entries.update({str(item["id"]): (split, item) for item in _read_labels(root, name)})
    if not entries:
        raise InputError(
            f"{root} holds no label file of Something-Something v2.",
            remedy='Expected train.json and validation.json, lists of {"id": ..., "label": ..., "template": ...}.',
        )
    videos = {PurePosixPath(name).stem: name for name in names if is_video(name)}
    clips = [_clip(number, split, item, videos) for number, (split, item) in entries.items()]
    strays = [
        Clip(source_id=name, videos=(SourceVideo(path=name),), problem="no label file names this video")
        for stem, name in videos.items()
        if stem not in entries
    ]
    return sorted(clips + strays, key=lambda clip: clip.source_id)


def _split_of(name: str) -> str | None:
    """The split of a label file's name, None for another file (`labels.json` lists the classes)."""
    path = PurePosixPath(name)
    if path.suffix != ".json":
        return None
    return next((split for split in SPLITS if split in path.stem.lower()), None)


def _read_labels(root: str, name: str) -> list[dict[str, Any]]:
    place = join(root, name)
    entries = read_json(place)
    if not isinstance(entries, list) or not all(isinstance(item, dict) and "id" in item for item in entries):
        raise InputError(f"{place} is no list of labelled ids.", remedy="Download the label files again.")
    return entries


def _clip(number: str, split: str, item: dict[str, Any], videos: dict[str, str]) -> Clip:
    if not PLAIN_NAME.fullmatch(number):
        return Clip(source_id=number, videos=(), problem=f"the label file of {split} has the id {number!r}")
    template = str(item.get("template", "")).replace("[", "").replace("]", "")
    metadata: dict[str, Any] = {"source_split": split}
    if isinstance(item.get("placeholders"), list):
        metadata["placeholders"] = [str(word) for word in item["placeholders"]]
    return Clip(
        source_id=number,
        videos=(SourceVideo(path=videos.get(number, f"{number}.webm")),),
        text=str(item.get("label", "")),
        label=template,
        metadata=metadata,
    )
