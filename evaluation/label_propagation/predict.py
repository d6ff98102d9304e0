"""One sequence, one model: pictures to features to label maps at the size of the annotations.

Shape letters: T frames, H and W pixels, h and w grid cells, D width.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from evaluation.label_propagation.config import LabelPropagationConfig
from evaluation.label_propagation.metrics import resize_nearest
from evaluation.label_propagation.propagate import harden, propagate
from infra.errors import ConfigError
from training.protocols import Encoder

Pixels = npt.NDArray[np.uint8]
TOKENS_PER_BATCH = 8_192
STRETCHED_JPEG_QUALITY = 75  # the default of the library that the published pre-processing saved with


@dataclass(frozen=True)
class Clip:
    """A sequence as the protocol sees it: frames (T, H, W, 3) and labels (T, H, W), both stretched where asked."""

    name: str
    frames: Pixels
    labels: Pixels


def prepare(name: str, frames: Pixels, labels: Pixels, *, stretch: tuple[int, int] | None) -> Clip:
    """Apply the protocol's stretch: nearest for pictures and annotations alike, pictures saved as JPEG once more."""
    if stretch is None:
        return Clip(name, frames, labels)
    stretched = np.moveaxis(resize_nearest(np.moveaxis(frames, -1, 1), stretch), 1, -1)
    saved = np.stack([_jpeg_round_trip(frame) for frame in stretched])
    return Clip(name, saved, resize_nearest(labels, stretch).astype(np.uint8))


def copy_first_mask(clip: Clip) -> Pixels:
    """(T, H, W): the given labels in every frame."""
    return np.broadcast_to(clip.labels[0], clip.labels.shape)


def predict(clip: Clip, encoder: Encoder, config: LabelPropagationConfig) -> Pixels:
    """(T, H, W) label maps; the first is the given one."""
    size = working_size(clip.labels.shape[1:], config)
    if size[0] % encoder.patch_size or size[1] % encoder.patch_size:
        raise ConfigError(
            f"{clip.name} at {size[0]} x {size[1]} is not a whole number of patches of {encoder.patch_size}.",
            remedy="Change short_side and multiple.",
        )
    features = grid_features(encoder, clip.frames, size)
    grid_labels = resize_nearest(clip.labels[0], features.shape[1:3]).astype(np.int64)
    one_hot = torch.eye(int(clip.labels[0].max()) + 1)[torch.from_numpy(grid_labels)]
    soft = propagate(features, one_hot, config.propagation)
    hard = np.stack([harden(frame[None], encoder.patch_size).numpy()[0] for frame in soft])
    resized = resize_nearest(hard, clip.labels.shape[1:])
    return np.concatenate([clip.labels[:1], resized]).astype(np.uint8)


def working_size(size: tuple[int, ...], config: LabelPropagationConfig) -> tuple[int, int]:
    """(height, width) of the pictures the encoder gets."""
    height, width = size
    short, long = min(height, width), max(height, width)
    if short == long:
        return config.short_side, config.short_side
    long_side = config.short_side * long // short // config.multiple * config.multiple
    long_side = max(long_side, config.multiple)
    return (long_side, config.short_side) if height > width else (config.short_side, long_side)


def grid_features(encoder: Encoder, frames: Pixels, size: tuple[int, int]) -> torch.Tensor:
    """(T, h, w, D) patch tokens after the final norm, the class token left out."""
    height, width = size[0] // encoder.patch_size, size[1] // encoder.patch_size
    batch = max(1, TOKENS_PER_BATCH // (height * width))
    parts = []
    for start in range(0, len(frames), batch):
        images = encoder.preprocess(resize_bilinear(frames[start : start + batch], size), size)
        parts.append(encoder.encode(images)[:, 1:].float().cpu())
    return torch.cat(parts).reshape(len(frames), height, width, -1)


def resize_bilinear(frames: Pixels, size: tuple[int, int]) -> Pixels:
    """(T, H, W, 3) uint8 at another size: bilinear between pixel centres, without smoothing, as the protocols do."""
    if frames.shape[1:3] == size:
        return frames
    images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    resized = functional.interpolate(images, size, mode="bilinear", align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _jpeg_round_trip(frame: Pixels) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(buffer, "JPEG", quality=STRETCHED_JPEG_QUALITY)
    return np.asarray(Image.open(buffer).convert("RGB"))
