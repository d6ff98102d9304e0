"""Crop, resize and normalise: uint8 until the device, bicubic with antialiasing exactly as the papers' PIL path.

Shape letters: N images, H height, W width, 3 RGB, S side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from training.data.rng import ClipRandom

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_TRIES = 10


class Box(NamedTuple):
    """A crop in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_resized_crop(
    random: ClipRandom, height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """torchvision's rule: ten tries of (area share, log-uniform width/height), then the largest central crop."""
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(MAX_TRIES):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = random.integer(0, height - crop_height)
            return Box(top, random.integer(0, width - crop_width), crop_height, crop_width)
    return central_crop(height, width, ratio=ratio)


def central_crop(height: int, width: int, *, ratio: tuple[float, float]) -> Box:
    """The largest central crop whose width/height lies within `ratio`."""
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def crop_resize(images_NHW3: npt.NDArray[np.uint8], box: Box, size: int, *, flip: bool = False) -> torch.Tensor:
    """One box out of every image, resized to (N, 3, size, size) uint8, all of them mirrored with `flip`.

    The memory format is channels last: the fast path of the uint8 kernel, which agrees with
    Pillow's horizontal-then-vertical passes to a hundredth of a level on average.
    """
    bottom, right = box.top + box.height, box.left + box.width
    crops = torch.from_numpy(images_NHW3)[:, box.top : bottom, box.left : right].permute(0, 3, 1, 2)
    resized = F.interpolate(crops, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.flip(-1) if flip else resized


def normalise(
    images: torch.Tensor,
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> contiguous float32 of the same shape, on the device the images are on."""
    scale = torch.tensor([1.0 / (255.0 * s) for s in std], device=images.device).view(3, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(3, 1, 1)
    return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).sub_(shift)
