"""The conditional 1-D UNet over an action chunk (Diffusion Policy, Chi 2023; after Janner 2022), FiLM in every block.

Shape letters: B batch, K chunk (the axis that is convolved), D action target, C channels, G condition, E step code.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn

from infra.config import Config

MAX_PERIOD = 10_000.0


class UNet1DConfig(Config):
    """Sizes; the defaults are the published ones for policies that see pictures."""

    channels: tuple[int, ...] = Field(default=(512, 1024, 2048), min_length=2)
    kernel: int = Field(default=5, ge=1)
    groups: int = Field(default=8, ge=1)
    step_dim: int = Field(default=128, ge=4)

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if not self.kernel % 2:
            raise ValueError(f"kernel {self.kernel} is even: it would shift the chunk")
        if self.step_dim % 2 or any(width % self.groups for width in self.channels):
            raise ValueError(f"step_dim {self.step_dim} must be even, channels {self.channels} divide by {self.groups}")
        return self

    @property
    def downscale(self) -> int:
        """Chunks must divide by this."""
        return int(2 ** (len(self.channels) - 1))


class StepCode(nn.Module):
    """Diffusion step -> sine and cosine code -> two linear layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        periods = torch.exp(torch.arange(half) * (-math.log(MAX_PERIOD) / max(half - 1, 1)))
        self.register_buffer("periods", periods, persistent=False)
        self.layers = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))

    def forward(self, steps_B: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, E)."""
        angles = steps_B[:, None].to(self.periods.dtype) * self.periods
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=-1))


class ConvBlock(nn.Sequential):
    """Convolution, group norm, Mish; the length stays."""

    def __init__(self, inputs: int, outputs: int, config: UNet1DConfig) -> None:
        super().__init__(
            nn.Conv1d(inputs, outputs, config.kernel, padding=config.kernel // 2),
            nn.GroupNorm(config.groups, outputs),
            nn.Mish(),
        )


class FiLMBlock(nn.Module):
    """Two convolution blocks with a skip; the condition scales and shifts the channels between them (FiLM)."""

    def __init__(self, inputs: int, outputs: int, condition_dim: int, config: UNet1DConfig) -> None:
        super().__init__()
        self.first = ConvBlock(inputs, outputs, config)
        self.second = ConvBlock(outputs, outputs, config)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition_dim, 2 * outputs))
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, chunk_BCK: torch.Tensor, condition_BG: torch.Tensor) -> torch.Tensor:
        """(B, inputs, K) -> (B, outputs, K)."""
        scale, shift = self.film(condition_BG)[..., None].chunk(2, dim=1)
        return self.second(scale * self.first(chunk_BCK) + shift) + self.skip(chunk_BCK)


class Level(nn.Module):
    """Two FiLM blocks, then half or twice the length."""

    def __init__(
        self, inputs: int, outputs: int, condition_dim: int, config: UNet1DConfig, *, resize: nn.Module
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FiLMBlock(width, outputs, condition_dim, config) for width in (inputs, outputs))
        self.resize = resize

    def forward(self, chunk_BCK: torch.Tensor, condition_BG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (before, after) the change of length."""
        for block in self.blocks:
            chunk_BCK = block(chunk_BCK, condition_BG)
        return chunk_BCK, self.resize(chunk_BCK)


class ConditionalUNet1D(nn.Module):
    """Noisy chunk (B, K, D), diffusion step (B,) and condition (B, G) -> predicted noise (B, K, D)."""

    def __init__(self, config: UNet1DConfig, *, action_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.config = config
        self.step_code = StepCode(config.step_dim)
        seen = config.step_dim + condition_dim
        widths = config.channels
        halving = [*(_halved(width) for width in widths[:-1]), nn.Identity()]
        self.down = nn.ModuleList(
            Level(inputs, outputs, seen, config, resize=resize)
            for (inputs, outputs), resize in zip(pairwise((action_dim, *widths)), halving, strict=True)
        )
        self.middle = Level(widths[-1], widths[-1], seen, config, resize=nn.Identity())
        self.up = nn.ModuleList(
            Level(2 * inputs, outputs, seen, config, resize=_doubled(outputs))
            for inputs, outputs in pairwise(widths[::-1])
        )
        self.out = nn.Sequential(ConvBlock(widths[0], widths[0], config), nn.Conv1d(widths[0], action_dim, 1))

    def forward(self, chunk_BKD: torch.Tensor, steps_B: torch.Tensor, condition_BG: torch.Tensor) -> torch.Tensor:
        """See the class."""
        condition = torch.cat([self.step_code(steps_B), condition_BG], dim=-1)
        chunk, kept = chunk_BKD.transpose(1, 2), []
        for level in self.down:
            before, chunk = level(chunk, condition)
            kept.append(before)
        chunk = self.middle(chunk, condition)[1]
        for level in self.up:
            chunk = level(torch.cat([chunk, kept.pop()], dim=1), condition)[1]
        return self.out(chunk).transpose(1, 2)


def _halved(width: int) -> nn.Module:
    return nn.Conv1d(width, width, 3, stride=2, padding=1)


def _doubled(width: int) -> nn.Module:
    return nn.ConvTranspose1d(width, width, 4, stride=2, padding=1)
