"""Noise levels of training and the preconditioned target (EDM, Karras et al. 2022) with the policy's data deviation.

Shape letters: B clips. Unlike the video model, the loss is on the network's own output, so no weight appears.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

LOG_LOGISTIC_SCALE = 0.5


class Preconditioning(NamedTuple):
    """Factors of x0 = c_out * F(c_in * x, c_noise) + c_skip * x; all shaped like sigma."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor  # what the network gets as its time: ln(sigma) / 4


def precondition(sigma: torch.Tensor, sigma_data: float) -> Preconditioning:
    """Factors for noise levels of any shape."""
    variance = sigma.square() + sigma_data**2
    root = variance.sqrt()
    return Preconditioning(sigma_data**2 / variance, sigma * sigma_data / root, 1 / root, sigma.log() / 4)


def log_logistic_sigma(
    uniform: torch.Tensor, *, median: float, sigma_min: float, sigma_max: float, scale: float = LOG_LOGISTIC_SCALE
) -> torch.Tensor:
    """Training noise levels, float32, from uniform numbers in [0, 1) of any shape.

    ln(sigma) is logistic around ln(median), cut off at both ends in the distribution function; in float64 as released.
    """

    def below(sigma: float) -> float:
        return 1 / (1 + math.exp(-(math.log(sigma) - math.log(median)) / scale))

    low, high = below(sigma_min), below(sigma_max)
    share = low + uniform.double() * (high - low)
    return (share.logit() * scale + math.log(median)).exp().float()
