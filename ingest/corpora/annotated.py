"""Data sets in the annotated layout of video prediction policies, one or several side by side:

    [DATASET/]annotation/SPLIT/NAME.json     texts, videos: [{video_path}], state(s), action(s), video_length
    [DATASET/]videos/...                     paths in the JSON are relative to the data set's folder

Traps handled here: the JSON may list fewer cameras than the episode's own folder holds; states are under `state` or
`states` and a length comes from `state` when there is one, else from `video_length`; `episode_id` is not the name.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import InputError
from infra.storage import join, list_names, read_json
from ingest.corpora.folder import is_video
from ingest.schema import DEFAULT_CAMERA, Clip, SourceVideo

ARRAY_KEYS = {
    "proprioception": ("state", "states"),
    "actions": ("action", "actions"),
    "gripper": ("continuous_gripper_state",),
}
KEPT_KEYS = ("task", "episode_id", "video_length")


def list_clips(root: str) -> list[Clip]:
    """One clip per annotation, with all cameras of its episode; videos that no annotation names are listed as well."""
    names = list_names(root, recursive=True)
    annotations = [name for name in names if _dataset_of(name) is not None]
    if not annotations:
        raise InputError(
            f"{root} is not in the annotated layout.",
            remedy="Expected annotation/SPLIT/NAME.json in it, or in each folder below it.",
        )
    videos = {name for name in names if is_video(name)}
    clips = [_clip(root, name, videos) for name in annotations]
    named = {video.path for clip in clips for video in clip.videos}
    strays = [
        Clip(source_id=name, videos=(SourceVideo(path=name),), problem="no annotation names this video")
        for name in sorted(videos - named)
    ]
    return sorted(clips + strays, key=lambda clip: clip.source_id)


def read_trajectory(root: str, clip: Clip) -> dict[str, npt.NDArray[np.generic]]:
    """proprioception (T, P), actions (T - 1 or T, A), gripper (T,): float32, those of them that the JSON has."""
    record = read_json(join(root, clip.trajectory))
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for target, keys in ARRAY_KEYS.items():
        key = next((key for key in keys if key in record), None)
        if key is None:
            continue
        try:
            arrays[target] = np.asarray(record[key], np.float32)
        except (TypeError, ValueError):
            raise InputError(f"{clip.trajectory}: {key!r} is not a rectangular list of numbers.") from None
    return arrays


def _dataset_of(name: str) -> PurePosixPath | None:
    """The data set's folder of an annotation path, None if it is not one."""
    path = PurePosixPath(name)
    if path.suffix != ".json" or len(path.parts) < 3 or path.parts[-3] != "annotation":
        return None
    return PurePosixPath(*path.parts[:-3])


def _clip(root: str, name: str, videos: set[str]) -> Clip:
    path = PurePosixPath(name)
    dataset = _dataset_of(name)
    assert dataset is not None
    source_id = str(dataset / path.parts[-2] / path.stem)
    record = _read_annotation(root, name)
    listed = _listed_videos(record, dataset) if isinstance(record, dict) else []
    if not isinstance(record, dict) or not listed:
        problem = f"{name} is not a JSON object with a list of videos"
        return Clip(source_id=source_id, videos=(), trajectory=name, problem=problem)
    cameras = sorted({*listed, *_siblings(listed, path.stem, videos)})
    states = record.get("state")
    declared = len(states) if isinstance(states, list) else record.get("video_length")
    texts = record.get("texts")
    has_arrays = any(key in record for keys in ARRAY_KEYS.values() for key in keys)
    metadata = {key: record[key] for key in KEPT_KEYS if isinstance(record.get(key), str | int)}
    metadata |= {"dataset": dataset.name, "source_split": path.parts[-2]}
    if unlisted := sorted(set(cameras) - set(listed)):
        metadata["unlisted_videos"] = unlisted
    return Clip(
        source_id=source_id,
        videos=tuple(SourceVideo(camera=_camera(item, len(cameras)), path=item) for item in cameras),
        text=texts[0] if isinstance(texts, list) and texts and isinstance(texts[0], str) else "",
        label=dataset.name,
        declared_num_frames=declared if isinstance(declared, int) else None,
        trajectory=name if has_arrays else "",
        metadata=metadata,
    )


def _read_annotation(root: str, name: str) -> Any:
    try:
        return read_json(join(root, name))
    except InputError:
        return None


def _listed_videos(record: dict[str, Any], dataset: PurePosixPath) -> list[str]:
    entries = record.get("videos")
    if not isinstance(entries, list):
        return []
    paths = [entry.get("video_path") if isinstance(entry, dict) else None for entry in entries]
    safe = [item for item in paths if isinstance(item, str) and item and _stays_inside(PurePosixPath(item))]
    return [str(dataset / item) for item in safe] if len(safe) == len(paths) else []


def _stays_inside(path: PurePosixPath) -> bool:
    return not path.is_absolute() and ".." not in path.parts


def _siblings(listed: list[str], stem: str, videos: set[str]) -> list[str]:
    """Further cameras: videos beside the listed ones, where that folder belongs to this episode alone."""
    folders = {str(PurePosixPath(item).parent) for item in listed}
    own = {folder for folder in folders if PurePosixPath(folder).name == stem}
    return [item for item in videos if str(PurePosixPath(item).parent) in own]


def _camera(path: str, num_cameras: int) -> str:
    if num_cameras == 1:
        return DEFAULT_CAMERA
    return re.sub(r"[^A-Za-z0-9_-]", "-", PurePosixPath(path).stem) or DEFAULT_CAMERA
