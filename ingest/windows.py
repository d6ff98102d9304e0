"""Which frames of which episodes are one clip of a video model: the rules of the papers, and the list they make.

The same list serves training and evaluation, so that "held out" and "trained on" mean the same clips. Shape letters:
T frames of a clip, H height, W width.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import Config
from ingest.reader import Split


class WindowRule(Config):
    """How clips of `num_frames` are cut from an episode.

    `linspace`: one clip an episode, frames int(linspace(0, T - 1, num_frames)); episodes longer than
    `max_source_frames` are left out (100 in the published mix). `windows`: a clip starts every `start_every` frames
    and takes every `stride`-th one; beyond the end the last frame repeats, so late windows stand still at their end.
    `short` says what becomes of an episode with fewer frames than `num_frames`: one clear error, repeated frames as
    in the official code, or left out.
    """

    kind: Literal["linspace", "windows"] = "windows"
    num_frames: int = Field(default=16, ge=2)
    stride: int = Field(default=2, ge=1)
    start_every: int = Field(default=2, ge=1)
    max_source_frames: int | None = Field(default=None, ge=2)
    short: Literal["error", "repeat", "drop"] = "error"


class ClipSource(Config):
    """Clips of one data set, or of the samples of it with one of `labels`.

    `probability` weighs it in a mixture (any positive scale), `loss_coefficient` is the lambda of the paper's
    equation 4 (1 in the official code). `cameras` maps a camera to its share; empty means each sample's first one.
    """

    name: str = Field(min_length=1)
    url: str
    labels: tuple[str, ...] = ()
    split: Split | None = "train"
    probability: float = Field(default=1.0, gt=0)
    loss_coefficient: float = Field(default=1.0, gt=0)
    cameras: dict[str, float] = Field(default_factory=dict)
    rule: WindowRule = WindowRule()
    latents: str = Field(default="", description="url of a latent cache of this data set; empty: pixels")

    @model_validator(mode="after")
    def _cameras_have_shares(self) -> Self:
        if any(share <= 0 for share in self.cameras.values()):
            raise ValueError(f"cameras {self.cameras} have a share that is not positive")
        return self
