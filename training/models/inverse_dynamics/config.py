"""Configuration of the inverse dynamics model and of the Uni-Pi style policy around it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import Config
from training.export_files import ModelReference
from training.models.common.actions import ActionCodec
from training.models.common.planning import PlanConfig
from training.models.common.resnet import ResNetConfig


class InverseDynamicsConfig(Config):
    """Two frames `actions_per_pair` control steps apart -> the actions between them. It hears no sentence.

    `proprioception_dim` above 0: the state at the first frame is felt too. A plan has no states, so then only its
    first pair can be acted on.
    """

    image_size: int = Field(default=256, ge=8)
    vision: ResNetConfig = ResNetConfig()
    hidden: tuple[int, ...] = (256,)
    actions_per_pair: int = Field(default=2, ge=1)
    loss: Literal["mse", "smooth_l1"] = "smooth_l1"
    action_dim: int = Field(default=4, ge=1)
    proprioception_dim: int = Field(default=0, ge=0)
    uses_text: Literal[False] = False


class StoredUniPiPolicy(Config):
    """All a stored policy needs besides its weights and the video model that it names. `execute` actions of a plan."""

    network: InverseDynamicsConfig
    codec: ActionCodec
    video: ModelReference
    plan: PlanConfig
    camera: str = "main"
    execute: int = Field(ge=1)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.plan.stride != self.network.actions_per_pair:
            raise ValueError(f"plan.stride {self.plan.stride} is not actions_per_pair {self.network.actions_per_pair}")
        if self.codec.config.transform != "none":
            raise ValueError(
                f"codec transform {self.codec.config.transform!r} needs states, which a plan does not have"
            )
        if self.network.proprioception_dim and self.execute > self.network.actions_per_pair:
            raise ValueError(
                f"execute {self.execute} reaches beyond the first pair ({self.network.actions_per_pair} actions), "
                "but only its state is known"
            )
        return self

    @property
    def pairs(self) -> int:
        """Pairs of frames whose actions are carried out."""
        return -(-self.execute // self.network.actions_per_pair)
