"""Noise levels and preconditioning: EDM (Karras et al. 2022) with unit data deviation, as in SVD.

Shape letters: B clips. Sigmas multiply unit noise; latents are scaled (about unit deviation).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

SIGMA_MIN, SIGMA_MAX = 0.002, 700.0
RHO = 7.0


class Preconditioning(NamedTuple):
    """Factors of the EDM parametrisation x0 = c_out * F(c_in * x, c_noise) + c_skip * x; all shaped like sigma."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor  # what the network gets as its time: ln(sigma) / 4
    weight: torch.Tensor  # (sigma² + 1) / sigma², of the squared error of x0


def precondition(sigma: torch.Tensor) -> Preconditioning:
    """Factors for noise levels of any shape; with the minus in c_out, F is a v-prediction."""
    variance = sigma.square() + 1
    root = variance.sqrt()
    return Preconditioning(1 / variance, -sigma / root, 1 / root, sigma.log() / 4, variance / sigma.square())


def karras_sigmas(num_steps: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> torch.Tensor:
    """(num_steps + 1,) float32 falling noise levels, the last one 0. The first one is `sigma_max` for any count."""
    ramp = np.linspace(0, 1, num_steps)
    ends = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)
    sigmas = (ends[1] + ramp * (ends[0] - ends[1])) ** RHO
    return torch.from_numpy(np.append(sigmas, 0.0)).to(torch.float32)


def start_scale(sigma_max: float = SIGMA_MAX) -> float:
    """Deviation of the latents that sampling starts from: sqrt(sigma_max² + 1)."""
    return float((sigma_max**2 + 1) ** 0.5)


def guidance_ramp(guidance: tuple[float, float], num_frames: int, *, like: torch.Tensor) -> torch.Tensor:
    """(1, T, 1, 1, 1) weights rising linearly from the first frame's to the last one's."""
    ramp = torch.linspace(guidance[0], guidance[1], num_frames, device=like.device, dtype=like.dtype)
    return ramp.view(1, num_frames, 1, 1, 1)


def full_precision(values: torch.Tensor) -> torch.Tensor:
    """float32, or float64 when that is what comes in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
