"""Carrying first-frame labels through videos with frozen features, and scoring the result."""

from evaluation.label_propagation.metrics import (
    boundary_accuracy,
    davis_scores,
    mean_iou,
    pck,
    region_similarity,
)
from evaluation.label_propagation.propagate import PropagationConfig, harden, propagate

__all__ = [
    "PropagationConfig",
    "boundary_accuracy",
    "davis_scores",
    "harden",
    "mean_iou",
    "pck",
    "propagate",
    "region_similarity",
]
