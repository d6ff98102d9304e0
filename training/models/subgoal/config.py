"""Configuration of the sub-goal policy, Susie style."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import Config
from training.export_files import ModelReference
from training.models.common.actions import ActionCodec
from training.models.common.ddpm import DDPMConfig
from training.models.common.planning import PlanConfig
from training.models.common.resnet import ResNetConfig
from training.models.common.unet1d import UNet1DConfig


class SubgoalConfig(Config):
    """The network: a picture and a goal picture on the channels of one ResNet, and a denoised action chunk.

    It hears no sentence: that reaches it through the goal alone.
    """

    image_size: int = Field(default=256, ge=8)
    crop: int = Field(
        default=0, ge=0, description="side that is seen of both: at random in training, the middle in use"
    )
    vision: ResNetConfig = ResNetConfig()
    unet: UNet1DConfig = UNet1DConfig()
    diffusion: DDPMConfig = DDPMConfig()
    chunk: int = Field(default=16, ge=1)
    execute: int = Field(default=8, ge=1)
    action_dim: int = Field(default=4, ge=1)
    proprioception_dim: int = Field(default=4, ge=0)
    uses_text: Literal[False] = False

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
        """Width of the UNet's condition."""
        return self.vision.feature_dim + self.proprioception_dim


class StoredSubgoalPolicy(Config):
    """All a stored policy needs besides its weights and the video model that it names.

    A new sub-goal is imagined every `subgoal_every` control steps, a multiple of the actions executed at a time.
    """

    network: SubgoalConfig
    codec: ActionCodec
    video: ModelReference
    plan: PlanConfig
    camera: str = "main"
    subgoal_every: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.subgoal_every % self.network.execute:
            raise ValueError(
                f"subgoal_every {self.subgoal_every} is no multiple of execute {self.network.execute}: "
                "a policy looks at the world between its chunks only"
            )
        return self
