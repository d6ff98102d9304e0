"""Configuration of the Diffusion Policy."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from infra.config import Config
from training.models.common.actions import ActionCodec
from training.models.common.ddpm import DDPMConfig
from training.models.common.resnet import ResNetConfig
from training.models.common.text import TEXT_DIM, TEXT_ENCODER_NAME
from training.models.common.unet1d import UNet1DConfig


class DiffusionPolicyConfig(Config):
    """The network. The defaults are the published sizes: pictures of 84 pixels of which 76 are seen, two of them.

    `history` pictures lie `execute` control steps apart: one for each decision. A chunk starts at the decision.
    """

    cameras: tuple[str, ...] = Field(default=("main",), min_length=1)
    image_size: int = Field(default=84, ge=8)
    crop: int = Field(default=76, ge=0, description="side that is seen: at random in training, the middle in use")
    vision: ResNetConfig = ResNetConfig()
    unet: UNet1DConfig = UNet1DConfig()
    diffusion: DDPMConfig = DDPMConfig()
    history: int = Field(default=2, ge=1)
    chunk: int = Field(default=16, ge=1)
    execute: int = Field(default=8, ge=1)
    action_dim: int = Field(default=4, ge=1)
    proprioception_dim: int = Field(default=4, ge=0)
    text_dim: int = Field(default=TEXT_DIM, ge=0)  # 0: the sentence is not heard

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.execute > self.chunk:
            raise ValueError(f"execute {self.execute} exceeds chunk {self.chunk}")
        if self.chunk % self.unet.downscale:
            raise ValueError(f"chunk {self.chunk} does not divide by the UNet's {self.unet.downscale}")
        if self.crop > self.image_size:
            raise ValueError(f"crop {self.crop} exceeds image_size {self.image_size}")
        return self

    @property
    def condition_dim(self) -> int:
        """Width of the UNet's condition: features and proprioception of all pictures, and the sentence."""
        seen = len(self.cameras) * self.vision.feature_dim + self.proprioception_dim
        return self.history * seen + self.text_dim

    @property
    def history_offsets(self) -> tuple[int, ...]:
        """Frame offsets of the pictures of one decision, oldest first, e.g. (-8, 0); clamp at the first frame."""
        return tuple(-self.execute * back for back in reversed(range(self.history)))


class StoredDiffusionPolicy(Config):
    """All a stored policy needs besides weights; `seed` starts the keyed draws of its actions."""

    network: DiffusionPolicyConfig
    codec: ActionCodec
    text_encoder: str = TEXT_ENCODER_NAME
    seed: int = Field(default=0, ge=0)
