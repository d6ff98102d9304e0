"""Sizes and switches of the Video Prediction Policy's trained part (arXiv 2412.14803); defaults are the release's."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import Config

UNUSED_PROPRIOCEPTION_DIM = 8  # width of the release's embedding where the robot's state is not used (CALVIN)

SamplerName = Literal[
    "ddim", "euler", "heun", "dpm_2", "lms", "dpmpp_2s", "dpmpp_2m", "euler_ancestral", "dpmpp_sde"
]  # fmt: skip
ScheduleName = Literal["exponential", "karras", "linear", "vp", "ve", "cosine"]


class VideoFormerConfig(Config):
    """Video-Former: `num_latents` tokens for each of `num_frames` frames, out of features `condition_dim` wide.

    Kinds: "3d" as published; "2d" without attention between frames; "linear" no former at all, one linear map of
    every feature token (of the fields below only `dim` and `condition_dim` count then).
    """

    kind: Literal["3d", "2d", "linear"] = "3d"
    condition_dim: int = Field(default=2560, ge=1)
    dim: int = Field(default=384, ge=1)
    depth: int = Field(default=6, ge=1)
    num_frames: int = Field(default=16, ge=1)
    num_latents: int = Field(default=14, ge=1)
    num_heads: int = Field(default=8, ge=1)
    head_dim: int = Field(default=64, ge=1)  # of the cross-attention; between frames it is dim / num_heads
    mlp_ratio: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.kind == "3d" and self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} must be divisible by num_heads {self.num_heads}")
        return self


class ActionDenoiserConfig(Config):
    """The diffusion transformer over action chunks.

    `token_dim` is the Video-Former's width; `num_tokens` only sizes the release's unused position table.
    `proprioception_dim` 0: no such token. With `causal_cross_attention`, as released, action i sees the context tokens
    0..i; without it all of them. Dropout rates count in training mode only.
    """

    action_dim: int = Field(default=7, ge=1)
    chunk: int = Field(default=10, ge=1)
    token_dim: int = Field(default=384, ge=1)
    num_tokens: int = Field(default=224, ge=0)
    goal_dim: int = Field(default=512, ge=1)
    proprioception_dim: int = Field(default=0, ge=0)
    dim: int = Field(default=384, ge=4)
    encoder_layers: int = Field(default=4, ge=1)
    decoder_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=8, ge=1)
    attention_dropout: float = Field(default=0.3, ge=0, lt=1)
    residual_dropout: float = Field(default=0.1, ge=0, lt=1)
    mlp_dropout: float = Field(default=0.05, ge=0, lt=1)
    causal_cross_attention: bool = True
    train_proprioception: bool = False  # the release keeps this embedding at its random start
    sigma_data: float = Field(default=0.5, gt=0)
    sigma_min: float = Field(default=0.001, gt=0)  # ends of the training noise levels
    sigma_max: float = Field(default=80.0, gt=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.dim % self.num_heads or self.dim % 2:
            raise ValueError(f"dim {self.dim} must be even and divisible by num_heads {self.num_heads}")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self

    @property
    def proprioception_width(self) -> int:
        """Input width of the proprioception embedding, which exists even where it is not used."""
        return self.proprioception_dim or UNUSED_PROPRIOCEPTION_DIM


class SamplingConfig(Config):
    """Which noise levels a chunk is denoised at, and how. CALVIN's published numbers use `sigma_min` 1."""

    sampler: SamplerName = "ddim"
    schedule: ScheduleName = "exponential"
    num_steps: int = Field(default=10, ge=1)
    sigma_min: float = Field(default=0.001, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)

    @model_validator(mode="after")
    def _levels_fall(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self
