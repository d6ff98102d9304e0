"""Configuration of the behaviour-cloning policy on frozen features."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import Config
from training.models.common.text import TEXT_DIM, TEXT_ENCODER_NAME
from training.models.common.vit import EncoderConfig


class BehaviourCloningConfig(Config):
    """The head. The defaults are the chunked policy of the demo.

    CortexBench's: history 3, fusion "flare", batch_norm, no standardise, chunk 1, execute 1, loss "mse", text_dim 0.
    """

    feature: Literal["class_token", "patch_tokens", "none"] = "class_token"
    feature_dim: int = Field(default=0, ge=0)  # width of the encoder, 0 only for feature "none"
    num_tokens: int = Field(default=0, ge=0)  # patches of a square grid, for patch_tokens
    reduction: Literal["projection", "spatial_softmax"] = "projection"
    token_dim: int = Field(default=16, gt=0)  # channels per token after projection, or number of soft-argmax maps
    history: int = Field(default=1, ge=1)  # pictures seen, `execute` environment steps apart: one per decision
    fusion: Literal["last", "flare"] = "last"
    standardise: bool = True  # features per channel, with the training set's statistics
    hidden: tuple[int, ...] = (256, 256, 256)
    batch_norm: bool = False  # on the joined input, as CortexBench does
    loss: Literal["mse", "smooth_l1"] = "smooth_l1"
    chunk: int = Field(default=8, ge=1)  # actions predicted
    execute: int = Field(default=4, ge=1)  # actions carried out before the next decision
    action_dim: int = Field(default=4, ge=1)
    action_range: tuple[float, float] = (-1.0, 1.0)
    proprioception_dim: int = Field(default=4, ge=0)
    text_dim: int = Field(default=TEXT_DIM, ge=0)  # 0: the sentence is not seen

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.execute > self.chunk:
            raise ValueError(f"execute {self.execute} exceeds chunk {self.chunk}")
        if self.uses_images != (self.feature_dim > 0):
            raise ValueError(f"feature {self.feature!r} does not go with feature_dim {self.feature_dim}")
        if self.feature == "patch_tokens" and math.isqrt(self.num_tokens) ** 2 != max(self.num_tokens, 1):
            raise ValueError(f"num_tokens {self.num_tokens} is not the size of a square grid")
        if self.history > 1 and self.fusion == "last":
            raise ValueError(f"fusion 'last' ignores all but one of history {self.history}")
        if self.input_dim == 0:
            raise ValueError("the policy sees nothing: give it features, proprioception or text")
        return self

    @property
    def uses_images(self) -> bool:
        """False for the proprioception-alone control."""
        return self.feature != "none"

    @property
    def frame_dim(self) -> int:
        """Values of one picture after token reduction."""
        if self.feature != "patch_tokens":
            return self.feature_dim
        return self.token_dim * (self.num_tokens if self.reduction == "projection" else 2)

    @property
    def input_dim(self) -> int:
        """Width of the joined input: fused features, proprioception, sentence."""
        return self.frame_dim * self.history + self.proprioception_dim + self.text_dim

    @property
    def history_offsets(self) -> tuple[int, ...]:
        """Frame offsets of the pictures of one decision, oldest first, e.g. (-8, -4, 0); clamp at the first frame."""
        return tuple(-self.execute * back for back in reversed(range(self.history)))


class BehaviourCloningPolicyConfig(Config):
    """All a stored policy needs besides weights."""

    head: BehaviourCloningConfig
    encoder: EncoderConfig | None = None
    encoder_digest: str = ""
    camera: str = "main"
    text_encoder: str = TEXT_ENCODER_NAME
