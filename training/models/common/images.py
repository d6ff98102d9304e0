"""uint8 pictures to colour-normalised tensors and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch.nn import functional as F

from infra.config import Config

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocessing(Config):
    """How a model wants its pictures; saved with every export as `preprocessing.json`."""

    image_size: int = Field(default=224, gt=0)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    antialias: bool = True


def normalise(
    images_BCHW: torch.Tensor, *, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> torch.Tensor:
    """uint8 (or 0..255 float) RGB (B, 3, H, W) -> float32, zero mean and unit deviation over ImageNet's colours."""
    shift = torch.tensor(mean, device=images_BCHW.device).view(3, 1, 1) * 255
    scale = torch.tensor(std, device=images_BCHW.device).view(3, 1, 1) * 255
    return (images_BCHW.to(torch.float32) - shift) / scale


def to_pixels(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Colour-normalised -> RGB clamped to [0, 1]."""
    mean = images_BCHW.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = images_BCHW.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return (images_BCHW * std + mean).clamp(0, 1)


def preprocess(images_BHWC: npt.NDArray[np.uint8], how: Preprocessing, size: tuple[int, int]) -> torch.Tensor:
    """uint8 RGB of any size -> float32 (B, 3, *size), resized (aspect ignored) and colour-normalised."""
    images = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2)
    if tuple(images.shape[-2:]) != size:
        resized = F.interpolate(images.to(torch.float32), size, mode=how.interpolation, antialias=how.antialias)
        images = resized.clamp(0, 255)
    return normalise(images, mean=how.mean, std=how.std)
