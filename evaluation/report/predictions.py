"""Pictures of predicted futures, as files that training left: image triples, one strip, or arrays in an `.npz`."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluation.report.assets import Asset, AssetBox
from evaluation.report.inputs import Prediction, ReportInputs
from infra import storage
from infra.errors import ForeframeError, InputError

MAX_ROWS = 12
PICTURE_SIDE = 256
COLUMNS = ("current", "predicted", "true")
# Names training may give the arrays; the first present one of each column is read.
ARRAY_NAMES = {
    "current": ("current",),
    "predicted": ("predicted", "prediction", "predicted_future"),
    "true": ("true", "future", "true_future"),
}


@dataclass(frozen=True)
class PredictionRow:
    """Current, predicted and true frame side by side; or one strip that already holds them."""

    pictures: tuple[Asset, ...]
    caption: str
    is_strip: bool = False


def prediction_rows(inputs: ReportInputs, box: AssetBox) -> tuple[list[PredictionRow], list[str]]:
    """Rows of the section and the reasons for those that are absent."""
    rows: list[PredictionRow] = []
    problems: list[str] = []
    for prediction in inputs.predictions:
        try:
            rows.extend(_rows_of(prediction, inputs, box))
        except ForeframeError as error:
            problems.append(str(error))
    return rows[:MAX_ROWS], problems


def _rows_of(prediction: Prediction, inputs: ReportInputs, box: AssetBox) -> list[PredictionRow]:
    if prediction.strip.endswith(".npz"):
        columns = load_arrays(inputs.at(prediction.strip))
        return [
            PredictionRow(
                tuple(
                    box.pixels(image, name=f"{prediction.strip} row {row}", max_side=PICTURE_SIDE) for image in images
                ),
                prediction.caption,
            )
            for row, images in enumerate(zip(*columns, strict=True))
        ][:MAX_ROWS]
    if prediction.strip:
        return [PredictionRow((box.fetch(inputs.at(prediction.strip)),), prediction.caption, is_strip=True)]
    urls = (prediction.current, prediction.predicted, prediction.true)
    if not all(urls):
        raise InputError(f"prediction {prediction.caption!r} lacks a picture.", remedy="Give current, predicted, true.")
    return [PredictionRow(tuple(box.fetch(inputs.at(url)) for url in urls), prediction.caption)]


def load_arrays(url: str) -> list[npt.NDArray[np.uint8]]:
    """The three (N, H, W, 3) uint8 arrays of an `.npz`; `InputError` says which is missing or of another form."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{url} is not a readable npz: {error}.", remedy="Export the predictions again.") from None
    columns = []
    for column in COLUMNS:
        name = next((name for name in ARRAY_NAMES[column] if name in arrays), None)
        if name is None:
            raise InputError(f"{url} has no array {column!r}, only {sorted(arrays)}.", remedy="Export it again.")
        columns.append(_as_images(arrays[name], url, name))
    if len({len(column) for column in columns}) != 1:
        raise InputError(f"{url}: arrays of {[len(column) for column in columns]} rows.", remedy="Export it again.")
    return columns


def _as_images(array: npt.NDArray[np.generic], url: str, name: str) -> npt.NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise InputError(
            f"{url}: array {name!r} is {array.dtype} {array.shape}.", remedy="Store uint8 RGB of shape (N, H, W, 3)."
        )
    return array.astype(np.uint8, copy=False)
