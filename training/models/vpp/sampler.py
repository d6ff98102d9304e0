"""Noise schedules and samplers of the action denoiser, written on the denoised value alone.

The release takes them from k-diffusion: EDM (Karras et al. 2022) algorithms 1 and 2, DPM-Solver (Lu et al. 2022) and
DPM-Solver++ (2022), here in the variance-exploding form. A step towards D from level s to r is x <- D + (x - D) r / s:
that is Euler's step and, in -ln(sigma), DPM-Solver's first order one, so "ddim" and "euler" are one method.
Shape letters: B clips, K chunk, A action, S levels, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from infra.errors import ConfigError
from training.models.vpp.config import SamplerName, SamplingConfig

Denoise = Callable[[torch.Tensor, float], torch.Tensor]  # (noisy (B, K, A), level) -> denoised (B, K, A)

RHO = 7.0
VP_BETA_RANGE, VP_BETA_MIN, VP_END = 19.9, 0.1, 1e-3
COSINE_LEVELS, COSINE_RATIO_FLOOR, COSINE_OFFSET = 1000, 0.001, 0.008
LMS_ORDER = 4


def noise_levels(config: SamplingConfig) -> torch.Tensor:
    """(num_steps + 1,) float32 falling noise levels, the last one 0.

    "vp" has its own ends (152 to 0.01) and ignores the config's; "ve", as released, ends below `sigma_min`.
    """
    ramp = np.linspace(0.0, 1.0, config.num_steps)
    low, high = config.sigma_min, config.sigma_max
    if config.schedule == "exponential":
        levels = np.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))
    elif config.schedule == "karras":
        levels = (high ** (1 / RHO) + ramp * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO
    elif config.schedule == "linear":
        levels = high + ramp * (low - high)
    elif config.schedule == "vp":
        time = 1 + ramp * (VP_END - 1)
        levels = np.sqrt(np.exp(VP_BETA_RANGE * time**2 / 2 + VP_BETA_MIN * time) - 1)
    elif config.schedule == "ve":
        steps = max(1, config.num_steps - 1)
        levels = high * (low / high) ** (ramp * (config.num_steps + 1) / steps)
    else:
        levels = _cosine_levels(config)
    return torch.from_numpy(np.append(levels, 0.0)).float()


def _cosine_levels(config: SamplingConfig) -> np.ndarray:
    """Levels of improved DDPM's cosine schedule (EDM table 1, column iDDPM) within the config's ends."""

    def alpha_bar(step: int) -> float:
        return math.sin(math.pi / 2 * step / COSINE_LEVELS / (COSINE_OFFSET + 1)) ** 2

    levels = np.zeros(COSINE_LEVELS + 1)
    for step in range(COSINE_LEVELS, 0, -1):
        kept = max(alpha_bar(step - 1) / alpha_bar(step), COSINE_RATIO_FLOOR)
        levels[step - 1] = math.sqrt((levels[step] ** 2 + 1) / kept - 1)
    inside = levels[(levels >= config.sigma_min) & (levels <= config.sigma_max)]
    if not len(inside):
        raise ConfigError(
            f"no cosine level lies between {config.sigma_min} and {config.sigma_max}.", remedy="Widen the range."
        )
    return inside[np.round(np.linspace(0, len(inside) - 1, config.num_steps)).astype(int)]


def run_sampler(
    name: SamplerName,
    denoise: Denoise,
    start_BKA: torch.Tensor,
    sigmas_S: torch.Tensor,
    *,
    step_noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The chunk that `start`, noise at the first of falling levels ending in 0, is denoised to.

    Stochastic samplers use `step_noise` (R, B, K, A), standard normal, R = `num_step_draws`; without it they draw.
    """
    sigmas = sigmas_S.tolist()
    _check_levels(sigmas)
    if name in STOCHASTIC:
        draws = _draws(start_BKA, step_noise, num_step_draws(name, len(sigmas) - 1), generator)
        return STOCHASTIC[name](denoise, start_BKA, sigmas, draws)
    if name not in DETERMINISTIC:
        known = ", ".join([*DETERMINISTIC, *STOCHASTIC])
        raise ConfigError(f"unknown sampler {name!r}.", remedy=f"Known: {known}.")
    return DETERMINISTIC[name](denoise, start_BKA, sigmas)


def num_step_draws(name: SamplerName, num_steps: int) -> int:
    """Standard normal chunks a sampler takes on its way, besides its start."""
    return {"euler_ancestral": num_steps - 1, "dpmpp_sde": 2 * (num_steps - 1)}.get(name, 0)


def _euler(denoise: Denoise, state: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    for sigma, following in pairwise(sigmas):
        state = _towards(denoise(state, sigma), state, following / sigma)
    return state


def _heun(denoise: Denoise, state: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """EDM algorithm 1: the mean of the slopes at both ends of a step."""
    for sigma, following in pairwise(sigmas):
        slope = (state - denoise(state, sigma)) / sigma
        reached = state + slope * (following - sigma)
        if following > 0:
            second = (reached - denoise(reached, following)) / following
            reached = state + (slope + second) / 2 * (following - sigma)
        state = reached
    return state


def _dpm_2(denoise: Denoise, state: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """The slope at a step's geometric middle (DPM-Solver-2)."""
    for sigma, following in pairwise(sigmas):
        denoised = denoise(state, sigma)
        if following == 0:
            return denoised
        middle = math.sqrt(sigma * following)
        half = _towards(denoised, state, middle / sigma)
        state = state + (half - denoise(half, middle)) / middle * (following - sigma)
    return state


def _dpmpp_2s(denoise: Denoise, state: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """The denoised value at a step's geometric middle (DPM-Solver++ 2S)."""
    for sigma, following in pairwise(sigmas):
        denoised = denoise(state, sigma)
        if following == 0:
            return denoised
        middle = math.sqrt(sigma * following)
        state = _towards(denoise(_towards(denoised, state, middle / sigma), middle), state, following / sigma)
    return state


def _dpmpp_2m(denoise: Denoise, state: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Denoised values of this and the last step, extrapolated (DPM-Solver++ 2M)."""
    before: torch.Tensor | None = None
    for place, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(state, sigma)
        ahead = denoised
        if before is not None and following > 0:
            ratio = math.log(sigmas[place - 1] / sigma) / math.log(sigma / following)
            ahead = denoised + (denoised - before) / (2 * ratio)
        state = _towards(ahead, state, following / sigma)
        before = denoised
    return state


def _lms(denoise: Denoise, state: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Linear multistep: the polynomial through up to four slopes, integrated over the step."""
    slopes: list[torch.Tensor] = []
    for place, sigma in enumerate(sigmas[:-1]):
        slopes.append((state - denoise(state, sigma)) / sigma)
        del slopes[:-LMS_ORDER]
        known = sigmas[place + 1 - len(slopes) : place + 1]
        for weight, slope in zip(_lms_weights(known, sigma, sigmas[place + 1]), slopes, strict=True):
            state = state + weight * slope
    return state


def _lms_weights(known: Sequence[float], start: float, end: float) -> Iterator[float]:
    """Integral from `start` to `end` of each Lagrange polynomial over the known levels."""
    for place, level in enumerate(known):
        others = [other for number, other in enumerate(known) if number != place]
        basis = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
        integral = basis.integ()
        yield float((integral(end) - integral(start)) / basis(level))


def _euler_ancestral(
    denoise: Denoise, state: torch.Tensor, sigmas: Sequence[float], draws: Sequence[torch.Tensor]
) -> torch.Tensor:
    for place, (sigma, following) in enumerate(pairwise(sigmas)):
        down, up = _ancestral(sigma, following)
        state = _towards(denoise(state, sigma), state, down / sigma)
        if following > 0:
            state = state + draws[place] * up
    return state


def _dpmpp_sde(
    denoise: Denoise, state: torch.Tensor, sigmas: Sequence[float], draws: Sequence[torch.Tensor]
) -> torch.Tensor:
    """DPM-Solver++ for the SDE with a middle point; a step's two draws are increments of one Brownian path."""
    for place, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(state, sigma)
        if following == 0:
            return denoised
        middle = math.sqrt(sigma * following)
        first, second = draws[2 * place], draws[2 * place + 1]
        down, up = _ancestral(sigma, middle)
        half = _towards(denoised, state, down / sigma) + first * up
        down, up = _ancestral(sigma, following)
        path = first * math.sqrt(sigma - middle) + second * math.sqrt(middle - following)
        state = _towards(denoise(half, middle), state, down / sigma) + path * (up / math.sqrt(sigma - following))
    return state


def _towards(denoised: torch.Tensor, state: torch.Tensor, ratio: float) -> torch.Tensor:
    """`state` with its distance from `denoised` cut to `ratio`."""
    return torch.lerp(denoised, state, ratio)


def _ancestral(sigma: float, following: float) -> tuple[float, float]:
    """The level to step down to and the deviation of the noise that leads up to `following` again."""
    up = min(following, math.sqrt(following**2 * (sigma**2 - following**2) / sigma**2))
    return math.sqrt(max(0.0, following**2 - up**2)), up


def _draws(
    start: torch.Tensor, given: torch.Tensor | None, count: int, generator: torch.Generator | None
) -> Sequence[torch.Tensor]:
    shape = (count, *start.shape)
    if given is None:
        given = torch.randn(shape, generator=generator, device=start.device, dtype=start.dtype)
    elif tuple(given.shape) != shape:
        raise ConfigError(f"step_noise is {tuple(given.shape)} where {shape} is needed.")
    return list(given.to(start))


def _check_levels(sigmas: Sequence[float]) -> None:
    falling = all(a > b for a, b in pairwise(sigmas))
    if len(sigmas) < 2 or not falling or sigmas[-1] != 0:
        raise ConfigError(f"noise levels {sigmas} must fall and end in 0.", remedy="Take them from noise_levels.")


DETERMINISTIC: dict[str, Callable[[Denoise, torch.Tensor, Sequence[float]], torch.Tensor]] = {
    "ddim": _euler,
    "euler": _euler,
    "heun": _heun,
    "dpm_2": _dpm_2,
    "lms": _lms,
    "dpmpp_2s": _dpmpp_2s,
    "dpmpp_2m": _dpmpp_2m,
}
STOCHASTIC: dict[str, Callable[[Denoise, torch.Tensor, Sequence[float], Sequence[torch.Tensor]], torch.Tensor]] = {
    "euler_ancestral": _euler_ancestral,
    "dpmpp_sde": _dpmpp_sde,
}
