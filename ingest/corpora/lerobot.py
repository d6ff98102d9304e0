"""LeRobotDataset, versions 2.0, 2.1 and 3.0.

    meta/info.json                                       version, rate, features, where files lie (templates)
    2.x  meta/episodes.jsonl, data/chunk-000/episode_000000.parquet, videos/chunk-000/KEY/episode_000000.mp4
    3.0  meta/episodes/chunk-000/file-000.parquet, data/chunk-000/file-000.parquet, videos/KEY/chunk-000/file-000.mp4

In 3.0 many episodes share a file: the rows of one are found by their `episode_index`, its pictures by the seconds in
`meta/episodes`, each camera's its own. Pictures inside the tables are read from there. Depth maps are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import InputError
from infra.media_pictures import Pictures
from infra.storage import list_names
from ingest.corpora.cameras import camera_names
from ingest.corpora.lerobot_info import INFO, Info, is_index, is_number, read_info
from ingest.corpora.lerobot_tables import iterate_pictures, read_episode, read_lines, read_rows
from ingest.schema import Clip, SourceVideo

LINES, EPISODES = "meta/episodes.jsonl", "meta/episodes/"
PREFIXES = ("observation.images.", "observation.")


def list_clips(root: str) -> list[Clip]:
    """One clip per episode. A camera's video that is not there is found missing when it is read."""
    info = read_info(root)
    names = list_names(root, recursive=True)
    tables = [name for name in names if name.startswith(EPISODES) and name.endswith(".parquet")]
    expected = LINES if info.one_file_each else f"{EPISODES}chunk-000/file-000.parquet"
    if not (LINES in names if info.one_file_each else tables):
        raise InputError(f"{root} holds no {expected}, which a data set of version {info.version} has.")
    if info.one_file_each:
        rows = read_lines(root, LINES)
    else:
        rows = [row for name in tables for row in read_rows(root, name, without="stats/")]
    present, clips = set(names), {}
    for row in rows:
        clip = _clip(info, row, present)
        if clip.source_id in clips:
            raise InputError(f"{root}: {clip.source_id} is listed twice.", remedy=f"Mend {expected}.")
        clips[clip.source_id] = clip
    return [clips[key] for key in sorted(clips)]


def read_trajectory(root: str, clip: Clip) -> dict[str, npt.NDArray[np.generic]]:
    """actions (T, A), proprioception (T, P), those of them that exist, and every further feature of floats: float32.

    Further ones, (T,), (T, N) or (T, N, M), keep their names with `_` for what is no letter or digit; one that is not
    finite everywhere is left out. Raises `InputError` where the table disagrees with the episode or with the features.
    """
    info = read_info(root)
    table = read_episode(root, clip.trajectory, _episode(clip), list(info.arrays.values()))
    if len(table) != clip.declared_num_frames:
        listed = f"the list of episodes says {clip.declared_num_frames}"
        raise InputError(f"{clip.trajectory} has {len(table)} rows of {clip.source_id}, {listed}.")
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name, key in info.arrays.items():
        values = _values(table[key], key, len(table), tuple(info.features[key]["shape"]))
        if name in ("actions", "proprioception"):
            arrays[name] = values.reshape(len(table), -1)
        elif np.isfinite(values).all():
            arrays[name] = values
    return arrays


def read_pictures(root: str, clip: Clip, video: SourceVideo) -> Pictures:
    """JPEG or PNG bytes of a camera whose pictures lie in the table. Raises `InputError`, also while iterating."""
    table, _, key = video.path.partition("#")
    return Pictures(iterate_pictures(root, table, _episode(clip), key), float(clip.metadata["fps"]))


def _clip(info: Info, row: Mapping[str, Any], present: set[str]) -> Clip:
    number, length = row.get("episode_index"), row.get("length")
    if not is_index(number) or not is_index(length):
        raise InputError(f"{info.root}: an episode has the index {number!r} and the length {length!r}.")
    listed = row.get("tasks")
    tasks = [task for task in listed if isinstance(task, str)] if isinstance(listed, list) else []
    places = _Places(info, row, number)
    problem = places.problem or _disagreement(info, row, places, length)
    if not problem and places.table not in present:
        problem = f"{places.table} is missing"
    if not problem and not places.videos:
        problem = "the data set has no colour camera"
    return Clip(
        source_id=f"episode-{number:06d}",
        videos=places.videos,
        text=tasks[0] if tasks else "",
        label=tasks[0] if tasks else PurePosixPath(info.root).name,
        declared_num_frames=length,
        trajectory=places.table if info.arrays and not problem else "",
        problem=problem,
        metadata=_metadata(info, number, tasks),
    )


def _metadata(info: Info, number: int, tasks: list[str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"episode_index": number, "fps": info.fps, "codebase_version": info.version}
    optional = {
        "tasks": tasks if len(tasks) > 1 else [],
        "left_out": info.left_out,
        "robot_type": str(info.record.get("robot_type") or ""),
        "source_split": info.split_of(number),
    }
    return metadata | {key: value for key, value in optional.items() if value}


class _Places:
    """Where an episode's table and pictures are; `problem` says why that is not known."""

    def __init__(self, info: Info, row: Mapping[str, Any], number: int) -> None:
        self._info, self._row = info, row
        self._own = {"episode_chunk": number // info.chunks_size, "episode_index": number}
        self.table, self.problem = "", ""
        self.videos: tuple[SourceVideo, ...] = ()
        try:
            self.table = info.path("data_path", **self._file_of("data"))
            names = camera_names(info.cameras, PREFIXES)
            self.videos = tuple(self._video(key, names[key]) for key in sorted(names))
        except LookupError as error:
            self.problem = f"the list of episodes has no {error.args[0]} of it"

    def _video(self, key: str, camera: str) -> SourceVideo:
        if self._info.features[key]["dtype"] == "image":
            return SourceVideo(camera=camera, path=f"{self.table}#{key}", pictures=True)
        path = self._info.path("video_path", video_key=key, **self._file_of(f"videos/{key}"))
        if self._info.one_file_each:
            return SourceVideo(camera=camera, path=path)
        start, end = (self._value(f"videos/{key}/{side}_timestamp", is_number) for side in ("from", "to"))
        return SourceVideo(camera=camera, path=path, start_s=float(start), end_s=float(end))

    def _file_of(self, prefix: str) -> dict[str, int]:
        if self._info.one_file_each:
            return self._own
        return {name: self._value(f"{prefix}/{name}", is_index) for name in ("chunk_index", "file_index")}

    def _value(self, column: str, fits: Callable[[Any], bool]) -> Any:
        value = self._row.get(column)
        if not fits(value):
            raise LookupError(column)
        return value


def _disagreement(info: Info, row: Mapping[str, Any], places: _Places, length: int) -> str:
    """What in an episode's row contradicts its length, "" if nothing does."""
    first, end = row.get("dataset_from_index"), row.get("dataset_to_index")
    if is_index(first) and is_index(end) and end - first != length:
        return f"its rows {first} to {end} are {end - first}, its length is {length}"
    for video in places.videos:
        if video.start_s is None or video.end_s is None:
            continue
        frames = (video.end_s - video.start_s) * info.fps
        if video.start_s < 0 or abs(frames - length) > 0.5:
            span = f"{video.start_s:g} s to {video.end_s:g} s"
            return f"camera {video.camera} has {span}, {frames:g} frames, its length is {length}"
    return ""


def _values(column: Any, key: str, num_rows: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """(T, *shape) of a column. `InputError` when it has another shape."""
    try:
        values = np.asarray(column.to_pylist(), np.float32)
    except (TypeError, ValueError):
        raise InputError(f"{key!r} is not a rectangular list of numbers.") from None
    accepted = (shape, ()) if shape == (1,) else (shape,)  # one number a frame is stored without its axis
    if num_rows and values.shape[1:] not in accepted:
        raise InputError(f"{key!r} has the shape {values.shape[1:]} a frame, {INFO} says {shape}.")
    return values


def _episode(clip: Clip) -> int:
    return int(clip.metadata["episode_index"])
