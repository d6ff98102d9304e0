"""Euler steps down the Karras schedule with per-frame classifier-free guidance.

The unconditional half keeps the first frame and gets zeros for text, as in training's dropout.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from infra.errors import ConfigError
from training.models.tvp.schedule import SIGMA_MAX, guidance_ramp, karras_sigmas, precondition, start_scale

if TYPE_CHECKING:
    from training.models.tvp.model import Condition, TextGuidedVideoModel


@torch.no_grad()
def euler_sample(
    model: TextGuidedVideoModel,
    unit_noise_BTChw: torch.Tensor,
    tokens_BLD: torch.Tensor,
    condition: Condition,
    *,
    num_steps: int,
    guidance: tuple[float, float],
    fps: int,
    sigma_max: float = SIGMA_MAX,
    stop_after: int | None = None,
) -> torch.Tensor:
    """Scaled latents (B, T, C, h, w) after all steps, or after the first `stop_after` of them."""
    if num_steps < 1:
        raise ConfigError(f"{num_steps} sampling steps.", remedy="Take at least 1.")
    sigmas = karras_sigmas(num_steps, sigma_max=sigma_max).to(unit_noise_BTChw)
    latents = unit_noise_BTChw * start_scale(sigma_max)
    taken = num_steps if stop_after is None else stop_after
    for sigma, following in pairwise(sigmas[: taken + 1]):
        factors = precondition(sigma)
        answer = _guided(
            model, latents * factors.c_in, factors.c_noise, tokens_BLD, condition, guidance=guidance, fps=fps
        )
        predicted = factors.c_out * answer + factors.c_skip * latents
        # Euler's step, written so that nothing of the size of sigma (700 at first) is subtracted from its like.
        latents = predicted + (latents - predicted) * (following / sigma)
    return latents


def _guided(
    model: TextGuidedVideoModel,
    scaled_BTChw: torch.Tensor,
    time: torch.Tensor,
    tokens_BLD: torch.Tensor,
    condition: Condition,
    *,
    guidance: tuple[float, float],
    fps: int,
) -> torch.Tensor:
    times = time.expand(len(scaled_BTChw))
    if tuple(guidance) == (1.0, 1.0):  # the unconditional answer would cancel
        return model.network(scaled_BTChw, times, tokens_BLD, condition=condition, fps=fps)
    both = torch.cat([torch.zeros_like(tokens_BLD), tokens_BLD])
    twice = type(condition)(condition.raw_B1Chw.repeat(2, 1, 1, 1, 1), condition.strength_B.repeat(2))
    answers = model.network(scaled_BTChw.repeat(2, 1, 1, 1, 1), times.repeat(2), both, condition=twice, fps=fps)
    without, with_text = answers.chunk(2)
    return without + guidance_ramp(guidance, scaled_BTChw.shape[1], like=without) * (with_text - without)
