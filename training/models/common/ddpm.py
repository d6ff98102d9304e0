"""Denoising diffusion of action chunks: squared-cosine schedule, DDPM and DDIM steps.

Sources: DDPM (Ho 2020) equation 7, DDIM (Song 2021) equation 12, the cosine schedule of Nichol and Dhariwal (2021),
with the constants of Diffusion Policy (Chi 2023). Shape letters: B batch, K chunk, D action target, G condition, S
draws.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from infra.config import Config

COSINE_OFFSET = 0.008
MAX_BETA = 0.999
CLIP = 1.0  # normalised actions lie in [-1, 1], and so does every estimate of them


class DDPMConfig(Config):
    """Diffusion steps of training, and how many of them sampling takes: every (train // inference)-th, down to 0.

    The network answers with the noise ("epsilon") or with the chunk itself ("sample", which learns in fewer steps).
    """

    train_steps: int = Field(default=100, ge=1)
    inference_steps: int = Field(default=10, ge=1)
    sampler: Literal["ddim", "ddpm"] = "ddim"
    prediction: Literal["epsilon", "sample"] = "epsilon"

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.inference_steps > self.train_steps:
            raise ValueError(f"inference_steps {self.inference_steps} exceeds train_steps {self.train_steps}")
        return self

    @property
    def stride(self) -> int:
        """Training steps between two sampling steps."""
        return self.train_steps // self.inference_steps

    @property
    def steps(self) -> tuple[int, ...]:
        """The sampling steps, falling to 0."""
        return tuple(place * self.stride for place in reversed(range(self.inference_steps)))

    @property
    def draws(self) -> int:
        """Standard normal chunks that one sample takes: the start and, for DDPM, one for each step but the last."""
        return self.inference_steps if self.sampler == "ddpm" else 1


def alpha_bars(train_steps: int) -> tuple[float, ...]:
    """Share of signal (its square) left after each step: products of 1 - beta, beta from the cosine rule, capped."""

    def wanted(time: float) -> float:
        return math.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

    kept, product = [], 1.0
    for step in range(train_steps):
        beta = min(1 - wanted((step + 1) / train_steps) / wanted(step / train_steps), MAX_BETA)
        product *= 1 - beta
        kept.append(product)
    return tuple(kept)


class ChunkDiffusion(nn.Module):
    """A denoising network and the diffusion around it: `network(chunk_BKD, steps_B, condition_BG)` -> (B, K, D)."""

    def __init__(self, network: nn.Module, config: DDPMConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self._kept = alpha_bars(config.train_steps)
        self.register_buffer("alpha_bars", torch.tensor(self._kept), persistent=False)

    def noised(self, clean_BKD: torch.Tensor, noise_BKD: torch.Tensor, steps_B: torch.Tensor) -> torch.Tensor:
        """The chunk after `steps` + 1 steps of diffusion."""
        kept = self.alpha_bars[steps_B].view(-1, 1, 1)
        return kept.sqrt() * clean_BKD + (1 - kept).sqrt() * noise_BKD

    def loss(
        self,
        condition_BG: torch.Tensor,
        targets_BKD: torch.Tensor,
        *,
        steps_B: torch.Tensor,
        noise_BKD: torch.Tensor,
        mask_BK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean over clips of the answer's squared error over a clip's own actions (`mask` False: behind the end).

        So a batch's loss is the mean of its parts' losses, however it is split.
        """
        answer = self.network(self.noised(targets_BKD, noise_BKD, steps_B), steps_B, condition_BG).float()
        wanted = noise_BKD if self.config.prediction == "epsilon" else targets_BKD
        errors_BK = (answer - wanted).square().mean(dim=-1)
        if mask_BK is None:
            return errors_BK.mean()
        weights = mask_BK.to(errors_BK.dtype)
        return ((errors_BK * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)).mean()

    @torch.no_grad()
    def sample(self, condition_BG: torch.Tensor, unit_noise_BSKD: torch.Tensor) -> torch.Tensor:
        """Chunks (B, K, D) within [-1, 1] from `config.draws` standard normal ones each."""
        state = unit_noise_BSKD[:, 0]
        for place, step in enumerate(self.config.steps, start=1):
            steps_B = torch.full((len(state),), step, device=state.device)
            answer = self.network(state, steps_B, condition_BG).float()
            extra = unit_noise_BSKD[:, place] if self.config.sampler == "ddpm" and step > 0 else None
            state = self.previous(state, answer, step, noise_BKD=extra)
        return state

    def previous(
        self, state_BKD: torch.Tensor, answer_BKD: torch.Tensor, step: int, *, noise_BKD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One sampling step down: DDIM's with eta 0, or DDPM's posterior of "fixed small" variance plus `noise`."""
        kept = self._kept[step]
        before = self._kept[step - self.config.stride] if step >= self.config.stride else 1.0
        if self.config.prediction == "epsilon":
            noise, clean = answer_BKD, (state_BKD - math.sqrt(1 - kept) * answer_BKD) / math.sqrt(kept)
        else:
            noise, clean = (state_BKD - math.sqrt(kept) * answer_BKD) / math.sqrt(1 - kept), answer_BKD
        clean = clean.clamp(-CLIP, CLIP)
        if self.config.sampler == "ddim":
            return math.sqrt(before) * clean + math.sqrt(1 - before) * noise
        alpha = kept / before
        mean = math.sqrt(before) * (1 - alpha) / (1 - kept) * clean
        mean = mean + math.sqrt(alpha) * (1 - before) / (1 - kept) * state_BKD
        if noise_BKD is None:
            return mean
        return mean + math.sqrt((1 - before) / (1 - kept) * (1 - alpha)) * noise_BKD
