"""The generator's episode folders: `TASK/seed-00012.mp4` with `.npz` and `.json` beside it, `corpus.json` at the top.

An episode whose sidecars are missing is listed all the same: what is wrong with it belongs into the ledger.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import InputError
from infra.storage import join, list_names, read_bytes, read_json
from ingest.corpora.folder import is_video
from ingest.schema import Clip, SourceVideo

CORPUS_RECORD = "corpus.json"
MAX_ARRAYS_BYTES = 1 << 28
# The last three: damaged compression, one that is unknown or encrypted, a shape that no memory holds.
BROKEN = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError)


def list_clips(root: str) -> list[Clip]:
    """One clip per episode video. Raises `InputError` where the generator has not finished."""
    names = list_names(root, recursive=True)
    if CORPUS_RECORD not in names:
        raise InputError(
            f"{root} holds no {CORPUS_RECORD}, which the episode generator writes last.",
            remedy="Run the generator to its end, or ingest this folder as corpus 'folder'.",
        )
    present = set(names)
    return [_clip(root, name, present) for name in names if is_video(name)]


def read_trajectory(root: str, clip: Clip) -> dict[str, npt.NDArray[np.generic]]:
    """actions (T - 1 or T, 4), proprioception (T, 4) and whatever else the generator recorded."""
    return load_arrays(read_bytes(join(root, clip.trajectory)), clip.trajectory)


def load_arrays(data: bytes, name: str, keys: Collection[str] | None = None) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of an npz, or those of `keys`, without executing anything in it; `InputError` when it is not one."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_ARRAYS_BYTES:
            raise InputError(f"{name} claims {unpacked} bytes of arrays, above {MAX_ARRAYS_BYTES}.")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            if missing := sorted(set(keys or ()) - set(arrays.files)):
                raise InputError(f"{name} holds no array {missing[0]!r}.")
            found = {key: arrays[key] for key in (arrays.files if keys is None else keys)}
    except BROKEN as error:
        raise InputError(f"{name} is not an array file: {type(error).__name__}.") from None
    # numpy answers an entry that is no array with its bytes.
    if strange := [key for key, value in found.items() if not isinstance(value, np.ndarray)]:
        raise InputError(f"{name} is not an array file: {strange[0]!r} is no array.")
    return found


def _clip(root: str, name: str, present: set[str]) -> Clip:
    stem = str(PurePosixPath(name).with_suffix(""))
    sidecar, trajectory = f"{stem}.json", f"{stem}.npz"
    record, problem = _read_sidecar(root, sidecar) if sidecar in present else ({}, f"{sidecar} is missing")
    if not problem and trajectory not in present:
        problem = f"{trajectory} is missing"
    frames = record.get("num_frames")
    return Clip(
        source_id=stem,
        videos=(SourceVideo(path=name),),
        text=str(record.get("text", "")),
        label=str(record.get("task") or PurePosixPath(name).parent.name),
        declared_num_frames=frames if isinstance(frames, int) else None,
        trajectory="" if problem else trajectory,
        problem=problem,
        metadata=record,
    )


def _read_sidecar(root: str, name: str) -> tuple[dict[str, Any], str]:
    try:
        record = read_json(join(root, name))
    except InputError:
        return {}, f"{name} is not JSON"
    return (record, "") if isinstance(record, dict) else ({}, f"{name} is not a JSON object")
