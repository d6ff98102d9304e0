"""Uni-Pi style policy (Du 2023): inverse dynamics on frame pairs, in the plans of a frozen video model.

    foreframe train-policy --method unipi --preset tiny      minutes on one CPU core, given a video model

Only the inverse dynamics is trained here, on pairs of frames of real episodes at the video model's size and stride.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from infra.compute import ComputeConfig
from infra.errors import ConfigError
from training.checkpoint import CheckpointConfig
from training.data.picture_windows import EpisodePictures, PictureBatch, PictureDataConfig, WindowPlan
from training.export_baselines import noise_shape, save_policy, video_reference, video_sizes
from training.export_video import load_video_model
from training.models.common.actions import CodecConfig
from training.models.common.planning import PlanConfig
from training.models.common.resnet import ResNetConfig
from training.models.inverse_dynamics import (
    InverseDynamicsConfig,
    InverseDynamicsNetwork,
    StoredUniPiPolicy,
    UniPiPolicy,
)
from training.optim import OptimConfig, ScheduleConfig
from training.protocols import Images
from training.recipes.picture_task import POLICY_LIMITS, PictureRunConfig, PictureTask

FRAMES_AT_ONCE = 16


class UniPiRunConfig(PictureRunConfig):
    """A whole run. `video` is the export or diffusers folder of the video model; its size is filled into `network`.

    `frames`: "reconstructed" pairs have passed the model's autoencoder, as all that it imagines has. `execute` actions
    of a plan are carried out before the next one.
    """

    kind: Literal["train-unipi"] = "train-unipi"
    video: str = Field(min_length=1)
    network: InverseDynamicsConfig = InverseDynamicsConfig()
    plan: PlanConfig = PlanConfig()
    frames: Literal["real", "reconstructed"] = "reconstructed"
    execute: int = Field(default=8, ge=1)
    codec: CodecConfig = CodecConfig(scaling="deviation", deviation=1.0)
    proprioception: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.data.cameras) > 1:
            raise ValueError(f"a video model sees one camera, data.cameras has {self.data.cameras}")
        if self.plan.stride != self.network.actions_per_pair:
            raise ValueError(
                f"plan.stride {self.plan.stride} is not network.actions_per_pair {self.network.actions_per_pair}"
            )
        if self.codec.transform != "none":
            raise ValueError(f"codec.transform {self.codec.transform!r} needs states, which a plan does not have")
        if self.proprioception and self.execute > self.plan.stride:
            raise ValueError(
                f"execute {self.execute} reaches beyond the first pair of a plan ({self.plan.stride} actions), "
                "but proprioception is known there only"
            )
        return self

    def build_task(self) -> UniPiTask:
        """Open the episodes; the video model is loaded when it is first needed."""
        return UniPiTask(self)


def tiny(*, video: str, data: str, output: str, camera: str = "main", stride: int = 4) -> UniPiRunConfig:
    """One CPU core, minutes. `stride` is the video model's: 4 for finetune's tiny preset."""
    return UniPiRunConfig(
        output=output,
        video=video,
        data=PictureDataConfig(url=data, cameras=(camera,)),
        network=InverseDynamicsConfig(
            vision=ResNetConfig(width=16, blocks=(1, 1), group_channels=8), actions_per_pair=stride
        ),
        plan=PlanConfig(num_steps=10, stride=stride),
        execute=stride,
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4, ema_decay=0.99),
        schedule=ScheduleConfig(epochs=None, warmup_epochs=0, steps=1500, warmup_steps=50),
        log_every_steps=25,
        checkpoint=CheckpointConfig(every_steps=500),
        # Minutes of training: a group of workers would take longer to start than it saves.
        compute=ComputeConfig(workers=0),
    )


class UniPiTask(PictureTask):
    """Pairs of frames into the error of the actions between them."""

    config: UniPiRunConfig

    def __init__(self, config: UniPiRunConfig) -> None:
        self.reference = video_reference(config.video)
        sizes, stride = video_sizes(config.video), config.plan.stride
        planned = (sizes.num_frames - 1) * stride
        if config.execute > planned:
            raise ConfigError(
                f"execute = {config.execute}, but a plan of {sizes.num_frames} frames has {planned} actions.",
                remedy="Execute fewer.",
            )
        super().__init__(
            config,
            plan=WindowPlan(spans=((0, 0), (stride, stride)), size=sizes.image_size),
            chunk=stride,
            antialias=False,
            complete=True,
            models=(self.reference.digest,),
        )

    @property
    def network_config(self) -> InverseDynamicsConfig:
        """The configured network with the sizes of the video model and of these episodes."""
        found = {**self.widths, "image_size": self.plan.size}
        return InverseDynamicsConfig.parse(self.config.network.to_json() | found)

    @cached_property
    def stores(self) -> tuple[EpisodePictures, ...]:
        """Both frames of a pair from the same store."""
        through = Reconstruction(self.config.video) if self.config.frames == "reconstructed" else None
        return (self.pictures(through),) * 2

    def build_model(self) -> InverseDynamicsNetwork:
        """Fresh weights from the global generator."""
        return InverseDynamicsNetwork(self.network_config)

    def loss(self, model: nn.Module, batch: PictureBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """Mean error of the normalised actions."""
        assert isinstance(model, InverseDynamicsNetwork)
        seen = batch.to(device)
        return {"loss": model.loss(seen.images[:, 0], seen.targets, state_BP=seen.states[:, 0])}

    def export(self, folder: str, model: nn.Module, *, summary: dict[str, Any]) -> str:
        """Publish the inverse dynamics; the video model is named by digest."""
        assert isinstance(model, InverseDynamicsNetwork)
        stored = StoredUniPiPolicy(
            network=model.config,
            codec=self.codec,
            video=self.reference,
            plan=self.config.plan,
            camera=self.config.data.cameras[0],
            execute=self.config.execute,
        )
        video = load_video_model(self.config.video)
        facts = {"video model": f"{self.reference.digest} (was at {self.reference.url})", "frames": self.config.frames}
        return save_policy(
            folder,
            UniPiPolicy(model, video, stored, noise_shape=noise_shape(video)),
            title="Uni-Pi style policy",
            summary="A video model imagines the task, inverse dynamics acts what lies between its frames (Du 2023).",
            facts=self.facts(summary) | facts,
            limits=POLICY_LIMITS,
            inputs=self.inputs,
        )


class Reconstruction:
    """Frames as a video model's autoencoder gives them back, one at a time; the model is loaded when first called."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._video: Any = None

    def __call__(self, frames_NSSC: Images) -> Images:
        """(N, S, S, 3) uint8 of the model's size -> the same shape."""
        if self._video is None:
            self._video = load_video_model(self._url)
            self._video.clips_at_once = FRAMES_AT_ONCE
        return np.ascontiguousarray(self._video.reconstruct(frames_NSSC[:, None])[:, 0])
