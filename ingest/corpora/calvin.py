"""CALVIN: language annotations and the frames they name, one file a frame. The sets D, ABC_D, ABCD_D and debug alike.

[SET/]training|validation/episode_0358482.npz                        pictures, depth, states and actions of one frame
[SET/]training|validation/lang_annotations/auto_lang_ann.npy         sentence, task, first and last frame of each clip
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from infra.errors import InputError
from infra.media_decode import Image
from infra.media_pictures import Pictures
from infra.storage import join, list_names, read_bytes
from ingest.corpora.cameras import safe_name
from ingest.corpora.metaworld import load_arrays
from ingest.corpora.pickled import Array, load_object
from ingest.schema import Clip, SourceVideo

ANNOTATIONS = "lang_annotations/auto_lang_ann.npy"
FRAME_FILE = re.compile(r"episode_(\d{1,12})\.npz")
MAX_INDEX = 10**12
FPS = 30.0  # of the recordings and of their actions
CAMERAS = {"static": "rgb_static", "gripper": "rgb_gripper"}
ARRAYS = {"actions": ("rel_actions", 7), "proprioception": ("robot_obs", 15), "absolute_actions": ("actions", 7)}


def list_clips(root: str) -> list[Clip]:
    """One clip per language annotation; frames that none names are no clips."""
    names = list_names(root, recursive=True)
    tables = [name for name in names if name == ANNOTATIONS or name.endswith(f"/{ANNOTATIONS}")]
    if not tables:
        raise InputError(
            f"{root} holds no {ANNOTATIONS}.",
            remedy=f"Expected training/{ANNOTATIONS}, and training/episode_0000000.npz and so on beside its folder.",
        )
    frames = _frames_by_folder(names)
    clips = []
    for table in tables:
        folder = str(PurePosixPath(table).parents[1])
        for number, row in enumerate(_read_annotations(root, table)):
            clips.append(_clip("" if folder == "." else f"{folder}/", number, row, frames.get(folder, {})))
    return sorted(clips, key=lambda clip: clip.source_id)


def read_trajectory(root: str, clip: Clip) -> dict[str, npt.NDArray[np.generic]]:
    """actions (T, 7) relative to the hand, proprioception (T, 15), absolute_actions (T, 7): float32.

    Metres and radians, but for relative actions, which are scaled into -1..1; the last action opens (1) or closes (-1).
    Raises `InputError` where a frame's file is gone, broken, or holds other shapes.
    """
    rows: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in ARRAYS}
    for path in _frame_paths(clip):
        stored = load_arrays(read_bytes(join(root, path)), path, [key for key, _ in ARRAYS.values()])
        for name, (key, size) in ARRAYS.items():
            if stored[key].shape != (size,) or stored[key].dtype.kind not in "fiu":
                raise InputError(f"{path}: {key} is {stored[key].dtype} of shape {stored[key].shape}, not ({size},).")
            rows[name].append(stored[key].astype(np.float32))
    return {name: np.stack(values) for name, values in rows.items()}


def read_pictures(root: str, clip: Clip, video: SourceVideo) -> Pictures:
    """(H, W, 3) uint8 RGB, each from its frame's file; depth stays packed. Raises `InputError` while iterating."""
    return Pictures(_pictures(root, clip, video.path.partition("#")[2]), FPS)


def _pictures(root: str, clip: Clip, key: str) -> Iterator[Image]:
    for path in _frame_paths(clip):
        picture = load_arrays(read_bytes(join(root, path)), path, [key])[key]
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise InputError(f"{path}: {key} is {picture.dtype} of shape {picture.shape}, no RGB picture.")
        yield np.asarray(picture, np.uint8)


def _frame_paths(clip: Clip) -> Iterator[str]:
    """The files of a clip's frames, in order, named like its first."""
    first = PurePosixPath(clip.trajectory)
    digits = len(first.stem.removeprefix("episode_"))
    start, end = clip.metadata["indices"]
    for index in range(int(start), int(end) + 1):
        yield str(first.with_name(f"episode_{index:0{digits}d}.npz"))


def _frames_by_folder(names: list[str]) -> dict[str, dict[int, str]]:
    """Folder -> frame index -> name of its file."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        folder, _, base = name.rpartition("/")
        if match := FRAME_FILE.fullmatch(base):
            found.setdefault(folder or ".", {})[int(match[1])] = base
    return found


def _read_annotations(root: str, table: str) -> list[tuple[Any, Any, Any]]:
    """(sentence, task, frames) of each annotation."""
    record = load_object(read_bytes(join(root, table)), table)
    columns = [_column(record, table, *keys) for keys in (("language", "ann"), ("language", "task"), ("info", "indx"))]
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(str(len(column)) for column in columns)
        raise InputError(f"{table} has different numbers of sentences, tasks and spans: {counts}.")
    return list(zip(*columns, strict=True))


def _column(record: Any, table: str, group: str, key: str) -> list[Any]:
    inner = record.get(group) if isinstance(record, dict) else None
    column = _plain(inner.get(key)) if isinstance(inner, dict) else None
    if not isinstance(column, list | tuple):
        raise InputError(f"{table} has no list {group!r}, {key!r}.", remedy="Take the file as it was published.")
    return list(column)


def _plain(value: Any) -> Any:
    """An array within the annotations as lists."""
    if not isinstance(value, Array):
        return value
    return value.values if value.numbers is None else value.numbers.tolist()


def _clip(prefix: str, number: int, row: tuple[Any, Any, Any], frames: Mapping[int, str]) -> Clip:
    sentence, task, span = row[0], row[1], _plain(row[2])
    label = task if _is_text(task) else ""
    source_id = f"{prefix}{number:05d}-{safe_name(label)}"
    metadata: dict[str, Any] = {"task": label, "fps": FPS}
    if split := PurePosixPath(prefix).name:
        metadata["source_split"] = split
    if not _is_text(sentence) or not label or not _is_span(span):
        problem = "the annotation is no sentence, task, and first and last frame"
        return Clip(source_id=source_id, videos=(), problem=problem, metadata=metadata)
    start, end = span
    missing = next((index for index in range(start, end + 1) if index not in frames), None)
    known: dict[str, Any] = {"text": sentence.strip(), "label": label, "metadata": metadata | {"indices": [start, end]}}
    if missing is not None:
        digits = len(next(iter(frames.values()), "episode_0000000.npz")) - len("episode_.npz")
        problem = f"{prefix}episode_{missing:0{digits}d}.npz is missing"
        return Clip(source_id=source_id, videos=(), problem=problem, **known)
    first = prefix + frames[start]
    return Clip(
        source_id=source_id,
        videos=tuple(SourceVideo(camera=name, path=f"{first}#{key}", pictures=True) for name, key in CAMERAS.items()),
        declared_num_frames=end - start + 1,
        trajectory=first,
        **known,
    )


def _is_text(value: Any) -> TypeGuard[str]:
    """A str that can be written as UTF-8; a pickle can hold others."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_span(value: Any) -> bool:
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(index) is int for index in value)
    return is_pair and 0 <= value[0] <= value[1] < MAX_INDEX
