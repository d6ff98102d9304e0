"""Scores of propagated labels: J and F of DAVIS-2017, PCK of JHMDB, mean IoU of VIP.

Shape letters: T frames, H height, W width, O objects, J joints, A thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt

from infra.errors import InputError

Mask = npt.NDArray[np.bool_]
LabelMap = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]
VOID = 255
BOUNDARY_TOLERANCE = 0.008  # share of the image diagonal
RECALL_THRESHOLD = 0.5
DECAY_BINS = 4
BODY_BOX_SHARE = 0.6  # PCK scale: this share of the diagonal of the box around the joints


def region_similarity(truth: Mask, prediction: Mask) -> float:
    """J: intersection over union of two (H, W) masks; 1 when both are empty."""
    truth, prediction = _boolean_pair(truth, prediction)
    union = int(np.count_nonzero(truth | prediction))
    return 1.0 if union == 0 else int(np.count_nonzero(truth & prediction)) / union


def boundary_accuracy(truth: Mask, prediction: Mask, *, tolerance: float = BOUNDARY_TOLERANCE) -> float:
    """F: harmonic mean of boundary precision and recall of two (H, W) masks.

    A boundary pixel is matched when the other boundary has a pixel within ceil(tolerance * diagonal) pixels, in a
    disk. Neither mask has a boundary: 1; only one has: 0.
    """
    truth, prediction = _boolean_pair(truth, prediction)
    truth_edge, prediction_edge = _boundary(truth), _boundary(prediction)
    num_truth, num_prediction = int(truth_edge.sum()), int(prediction_edge.sum())
    if num_truth == 0 or num_prediction == 0:
        return 1.0 if num_truth == num_prediction else 0.0
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    window = _bounding_window(truth_edge | prediction_edge)
    truth_edge, prediction_edge = truth_edge[window], prediction_edge[window]
    precision = int((prediction_edge & _within(truth_edge, radius)).sum()) / num_prediction
    recall = int((truth_edge & _within(prediction_edge, radius)).sum()) / num_truth
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class DavisScores:
    """J and F of one sequence, (O, T - 2) each, first and last frame dropped, with the toolkit's statistics."""

    region: Floats
    boundary: Floats

    @property
    def num_objects(self) -> int:
        """Objects of the first annotation."""
        return self.region.shape[0]

    @property
    def statistics(self) -> dict[str, Floats]:
        """Toolkit names -> one value per object, (O,)."""
        columns = {}
        for letter, values in (("J", self.region), ("F", self.boundary)):
            columns[f"{letter}-Mean"] = values.mean(axis=1)
            columns[f"{letter}-Recall"] = (values > RECALL_THRESHOLD).mean(axis=1)
            columns[f"{letter}-Decay"] = np.array([_decay(row) for row in values])
        columns["J&F-Mean"] = (columns["J-Mean"] + columns["F-Mean"]) / 2
        return columns


def davis_scores(truth_THW: LabelMap, prediction_THW: LabelMap) -> DavisScores:
    """Semi-supervised scores of one sequence; label 0 is background, 255 in the truth counts as background.

    Objects are 1 to the largest index of the first annotation. An index above that in the prediction is an
    `InputError`, as are sequences under three frames (the first and the last are not scored).
    """
    truth, prediction = np.asarray(truth_THW), np.asarray(prediction_THW)
    if truth.shape != prediction.shape or truth.ndim != 3 or len(truth) < 3:
        raise InputError(
            f"truth {truth.shape} and prediction {prediction.shape} cannot be scored.",
            remedy="Give two label maps of equal shape (frames, height, width) with at least 3 frames.",
        )
    truth = np.where(truth == VOID, 0, truth)
    num_objects = int(truth[0].max())
    if num_objects == 0:
        raise InputError("the first annotation holds no object.", remedy="Start the sequence where objects are seen.")
    if (largest := int(prediction[1:].max())) > num_objects:
        raise InputError(f"the prediction holds object {largest}, the first annotation only 1 to {num_objects}.")
    scored = range(1, len(truth) - 1)
    region = np.empty((num_objects, len(scored)))
    boundary = np.empty_like(region)
    for row in range(num_objects):
        for column, frame in enumerate(scored):
            pair = truth[frame] == row + 1, prediction[frame] == row + 1
            region[row, column] = region_similarity(*pair)
            boundary[row, column] = boundary_accuracy(*pair)
    return DavisScores(region=region, boundary=boundary)


def davis_summary(scores: Sequence[DavisScores]) -> dict[str, float]:
    """Data set scores: the mean over all objects of all sequences, not over sequences."""
    if not scores:
        raise InputError("no sequences to summarise.", remedy="Score at least one sequence.")
    tables = [sequence.statistics for sequence in scores]
    return {name: float(np.concatenate([table[name] for table in tables]).mean()) for name in tables[0]}


@dataclass(frozen=True)
class PckScores:
    """Percentages of correct joints: `per_joint` (A, J), nan where a joint was never counted, and `mean` (A,).

    `num_lost` counts predictions marked -1, which the convention forgives: read it beside the score.
    """

    thresholds: tuple[float, ...]
    per_joint: Floats
    mean: Floats
    num_lost: int


def pck(
    truth_2JT: Floats | Sequence[Floats], prediction_2JT: Floats | Sequence[Floats], *, thresholds: Sequence[float]
) -> PckScores:
    """Share of joints within threshold * 0.6 * diagonal of the person's box, in percent, for one video or several.

    Coordinates are (x, y) in pixels; frame 0 of each video is given and not scored. A joint whose predicted x is
    negative is lost: it counts neither for the box nor for the score.
    """
    truths, predictions = _videos(truth_2JT), _videos(prediction_2JT)
    if [video.shape for video in truths] != [video.shape for video in predictions]:
        raise InputError("truth and prediction of joints differ in shape.", remedy="Give (2, joints, frames) each.")
    ratios, counted = [], []
    for truth, prediction in zip(truths, predictions, strict=True):
        seen = prediction[0] >= 0
        box = np.where(seen, truth, -np.inf).max(axis=1) - np.where(seen, truth, np.inf).min(axis=1)
        scale = BODY_BOX_SHARE * np.hypot(*np.where(seen.any(axis=0), box, 0.0))
        distance = np.hypot(*(prediction - truth))
        ratios.append(np.stack([distance <= threshold * scale for threshold in thresholds])[:, :, 1:])
        counted.append(seen[:, 1:])
    seen_JT, correct_AJT = np.concatenate(counted, axis=1), np.concatenate(ratios, axis=2)
    totals = seen_JT.sum(axis=1)
    hits = (correct_AJT & seen_JT).sum(axis=2)
    per_joint = 100.0 * np.where(totals > 0, hits / np.maximum(totals, 1), np.nan)
    mean = per_joint[:, totals > 0].mean(axis=1) if totals.any() else np.full(len(thresholds), np.nan)
    return PckScores(tuple(thresholds), per_joint, mean, int((~seen_JT).sum()))


def mean_iou(
    truth: LabelMap | Sequence[LabelMap], prediction: LabelMap | Sequence[LabelMap], *, num_classes: int
) -> float:
    """Mean over classes of intersection / union of one confusion matrix over all pixels of all images.

    Truth outside 0..num_classes-1 is not counted; a class absent from truth and prediction is left out of the mean;
    a prediction of another size is resized (nearest) to its truth.
    """
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    for truth_image, prediction_image in zip(_images(truth), _images(prediction), strict=True):
        resized = resize_nearest(prediction_image, truth_image.shape)
        inside = (truth_image >= 0) & (truth_image < num_classes)
        true_classes, predicted = truth_image[inside].astype(np.int64), resized[inside].astype(np.int64)
        if predicted.size and not 0 <= int(predicted.min()) <= int(predicted.max()) < num_classes:
            raise InputError(f"a predicted class is outside 0..{num_classes - 1}.", remedy="Check num_classes.")
        pairs = np.bincount(num_classes * true_classes + predicted, minlength=num_classes**2)
        confusion += pairs.reshape(num_classes, num_classes)
    diagonal = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - diagonal
    if not union.any():
        raise InputError("no pixel of a known class to score.", remedy="Check the annotations and num_classes.")
    return float((diagonal[union > 0] / union[union > 0]).mean())


def resize_nearest(labels: LabelMap, size: tuple[int, ...]) -> LabelMap:
    """Nearest resize of label maps (..., H, W) by pixel centres: pixel i shows source floor((i + 1/2) * old / new)."""
    source, target = labels.shape[-2:], (size[-2], size[-1])
    if source == target:
        return labels
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(source, target, strict=True))
    return labels[..., rows[:, None], columns]


def _boundary(mask: Mask) -> Mask:
    """A pixel that differs from its right, lower or lower-right neighbour; nothing lies beyond the border."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, lower, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    edge = (mask ^ right) | (mask ^ lower) | (mask ^ diagonal)
    return np.asarray(edge, dtype=bool)


def _within(edge: Mask, radius: int) -> Mask:
    """Dilation by a filled disk, exact because squared distances of pixels are whole numbers."""
    return np.asarray(distance_transform_edt(~edge) <= radius)


def _bounding_window(edge: Mask) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(edge.any(axis=1)), np.flatnonzero(edge.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _decay(values: Floats) -> float:
    """Mean of the first of four bins minus mean of the last; neighbouring bins share their edge frame."""
    edges = (np.round(np.linspace(1, len(values), DECAY_BINS + 1) + 1e-10) - 1).astype(int)
    return float(values[: edges[1] + 1].mean() - values[edges[-2] : edges[-1] + 1].mean())


def _boolean_pair(truth: Mask, prediction: Mask) -> tuple[Mask, Mask]:
    truth, prediction = np.asarray(truth, dtype=bool), np.asarray(prediction, dtype=bool)
    if truth.shape != prediction.shape or truth.ndim != 2:
        raise InputError(f"masks of shapes {truth.shape} and {prediction.shape} cannot be compared.")
    return truth, prediction


def _videos(joints: Floats | Sequence[Floats]) -> list[Floats]:
    if isinstance(joints, np.ndarray) and joints.ndim == 3:
        return [joints.astype(np.float64)]
    return [np.asarray(video, dtype=np.float64) for video in joints]


def _images(labels: LabelMap | Sequence[LabelMap]) -> list[LabelMap]:
    if isinstance(labels, np.ndarray) and labels.ndim == 2:
        return [labels]
    return [np.asarray(image) for image in labels]
