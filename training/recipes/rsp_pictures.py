"""Predicted futures beside the true ones, for people to look at; nothing is scored on them."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch

from training.data.frame_pairs import FramePairDataset
from training.data.pixels import normalise
from training.models.rsp import RSP

PICTURES_NAME = "predictions.npz"
NUM_PICTURES = 6


def predicted_futures(model: RSP, dataset: FramePairDataset, *, seed: int) -> bytes:
    """An `.npz` of `current`, `predicted` and `true`, each (N, S, S, 3) uint8: prior samples on clips spread evenly.

    Patch mean and contrast of the prediction are those of the true frame (the model predicts normalised patches).
    """
    clips = np.linspace(0, len(dataset) - 1, min(NUM_PICTURES, len(dataset))).astype(int).tolist()
    batch = dataset.__getitems__([(0, clip) for clip in clips])
    pairs = batch.images[:: dataset.config.repeated_sampling]
    images = normalise(pairs)
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    with torch.no_grad():
        predicted = model.predict_future(images[:, 0], images[:, 1], generator=generator)
    model.train(training)
    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        current=_pictures(pairs[:, 0]),
        predicted=_pictures((predicted.clamp(0, 1) * 255).round().to(torch.uint8)),
        true=_pictures(pairs[:, 1]),
    )
    return stream.getvalue()


def _pictures(images_BCHW: torch.Tensor) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(images_BCHW.permute(0, 2, 3, 1).numpy())
