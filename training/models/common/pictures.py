"""What policies that learn from pixels share: pictures at the model's size, and draws that belong to an episode.

Shape letters: N pictures, B environments, V cameras, H, W any size, S the model's side, c a crop's side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from infra.errors import InputError
from training.protocols import Images, Observation
from training.state import counter_seed


def resized(images_NHWC: Images, size: int, *, antialias: bool) -> Images:
    """uint8 RGB of any size -> (N, S, S, 3) uint8: bilinear, squashed to a square, rounded.

    Without `antialias` it is how video models resize; theirs stays in float.
    """
    if images_NHWC.shape[1:3] == (size, size):
        return images_NHWC
    pixels = torch.from_numpy(np.array(images_NHWC, order="C")).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=antialias)
    return pixels.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W) in [-1, 1]."""
    return images.movedim(-1, -3).to(torch.float32) / 127.5 - 1


def central_crop(images: torch.Tensor, side: int) -> torch.Tensor:
    """The middle (..., c, c, 3) of (..., S, S, 3); all of it for side 0."""
    if not side:
        return images
    start = (images.shape[-2] - side) // 2
    return images[..., start : start + side, start : start + side, :]


def views(observation: Observation, cameras: Sequence[str], size: int, *, antialias: bool) -> torch.Tensor:
    """(B, V, S, S, 3) uint8 of an observation; `InputError` names a camera that it lacks."""
    missing = sorted(set(cameras) - set(observation.images))
    if missing:
        raise InputError(
            f"the policy needs camera {', '.join(missing)}, the observation has {sorted(observation.images)}.",
            remedy="Render that camera.",
        )
    found = [resized(observation.images[camera], size, antialias=antialias) for camera in cameras]
    return torch.from_numpy(np.stack(found, axis=1))


def state_of(observation: Observation) -> torch.Tensor:
    """Proprioception (B, P) as a tensor of its own."""
    state: npt.NDArray[np.float32] = np.array(observation.proprioception, np.float32)
    return torch.from_numpy(state)


def episode_noise(
    observation: Observation, shape: Sequence[int], *, seed: int, purpose: str, decision: int
) -> torch.Tensor:
    """(B, *shape) standard normal numbers that follow from (seed, purpose, the episode's key, decision number)."""
    keys = observation.keys or tuple(str(place) for place in range(len(observation.text)))
    if len(keys) != len(observation.text):
        raise InputError(f"{len(keys)} keys for {len(observation.text)} sentences.", remedy="Give one key an episode.")
    seeds = [counter_seed(seed, purpose, key, decision) for key in keys]
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(value)) for value in seeds])
