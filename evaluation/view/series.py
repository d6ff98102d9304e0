"""A clip's arrays as series a browser can draw: plain numbers, at most `MAX_POINTS` a series."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluation.report.text import visible

MAX_POINTS = 2000
MAX_DIMS = 64
FIRST = ("actions", "proprioception")
LAST = ("timestamps",)


def series_of(arrays: Mapping[str, npt.NDArray[Any]], num_frames: int) -> list[dict[str, Any]]:
    """One entry per array, actions and proprioception first; an array that cannot be drawn says why."""

    def place(name: str) -> tuple[int, str]:
        return (FIRST.index(name) if name in FIRST else len(FIRST) + (name in LAST), name)

    return [_series(name, arrays[name], num_frames) for name in sorted(arrays, key=place)]


def _series(name: str, array: npt.NDArray[Any], num_frames: int) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": visible(name), "shape": list(array.shape), "dtype": visible(str(array.dtype))}
    if array.dtype.kind not in "biuf":
        return shown | {"problem": "not numbers"}
    if array.ndim == 0 or array.size == 0:
        return shown | {"problem": f"one value: {array.item()}" if array.size else "empty"}
    values_ND = array.reshape(len(array), -1)
    rows = np.unique(np.linspace(0, len(values_ND) - 1, min(len(values_ND), MAX_POINTS)).round().astype(np.int64))
    picked_ND = values_ND[rows][:, :MAX_DIMS].astype(np.float64)
    return shown | {
        "frames": [round(float(frame), 3) for frame in _frames(rows, len(values_ND), num_frames)],
        "dims": [[_number(value) for value in column] for column in picked_ND.T.tolist()],
        "num_dims": values_ND.shape[1],
        "every": -(-len(values_ND) // MAX_POINTS),
    }


def _frames(rows: npt.NDArray[np.int64], length: int, num_frames: int) -> npt.NDArray[np.float64]:
    """The frame each row belongs to: row i is frame i (the last frame may lack an action), else rows are spread."""
    if num_frames - 1 <= length <= num_frames or length == 1:
        return rows.astype(np.float64)
    return np.asarray(rows * ((num_frames - 1) / (length - 1)), np.float64)


def _number(value: float) -> float | None:
    """JSON knows no infinity and no NaN: both are gaps in the line."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
