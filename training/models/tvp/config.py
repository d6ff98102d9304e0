"""Sizes and constants of text-guided video prediction (VPP stage 1); defaults are the published ones.

The numbers that paper and official code disagree on follow the code (docs/recipes/tvp.md lists them).
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from infra.config import Config
from training.models.common.text import TextEncoderConfig


class UNetConfig(Config):
    """diffusers' UNetSpatioTemporalConditionModel; the last level has no attention, as in Stable Video Diffusion."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = Field(default=2, ge=1)
    num_attention_heads: tuple[int, ...] = (5, 10, 20, 20)
    cross_attention_dim: int = Field(default=1024, ge=1)
    addition_time_embed_dim: int = Field(default=256, ge=2)
    sample_size: int = Field(default=96, ge=1)

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if len(self.block_out_channels) != len(self.num_attention_heads):
            raise ValueError(f"{len(self.block_out_channels)} levels but heads {self.num_attention_heads}")
        if bad := [width for width in self.block_out_channels if width % 32]:
            raise ValueError(f"widths {bad} are no multiples of 32, which group normalisation needs")
        return self


class VAEConfig(Config):
    """diffusers' AutoencoderKLTemporalDecoder. Latents times `scaling_factor` have about unit deviation."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = Field(default=2, ge=1)
    latent_channels: int = Field(default=4, ge=1)
    sample_size: int = Field(default=768, ge=8)
    scaling_factor: float = Field(default=0.18215, gt=0)

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))


class TVPConfig(Config):
    """The whole model. `position_code` belongs to the weights: nothing else in a weight folder tells it."""

    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    num_frames: int = Field(default=16, ge=2)
    image_size: int = Field(default=256, ge=8)
    position_code: bool = True
    text_dropout: float = Field(default=0.05, ge=0, lt=1)
    sigma_log_mean: float = 0.7
    sigma_log_std: float = Field(default=1.6, gt=0)
    fps: int = Field(default=7, description="id given in training and sampling")
    extract_fps: int = Field(default=4, description="id given when features are extracted and in the release's sampler")
    motion_bucket: int = 127
    condition_noise_log_mean: float = -3.0
    condition_noise_log_std: float = Field(default=0.5, gt=0)
    sample_condition_noise_id: float = Field(default=0.02, ge=0, description="id only: sampling adds no noise")
    decode_chunk: int = Field(default=7, ge=1, description="frames decoded together by the temporal decoder")
