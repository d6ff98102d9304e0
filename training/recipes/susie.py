"""Susie style policy (Black 2023): a goal-conditioned diffusion policy whose goals a frozen video model imagines.

    foreframe train-policy --method susie --preset tiny      minutes on one CPU core, given a video model

Only the policy is trained here: its goals are later frames of the same episode. In use the goal is the last frame that
the video model predicts, anew every `subgoal_every` steps; the sentence reaches the policy through it alone.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from infra.compute import ComputeConfig
from training.checkpoint import CheckpointConfig
from training.data.picture_windows import EpisodePictures, PictureBatch, PictureDataConfig, WindowPlan
from training.export_baselines import noise_shape, save_policy, video_reference, video_sizes
from training.export_video import load_video_model
from training.models.common.planning import PlanConfig
from training.models.common.resnet import ResNetConfig
from training.models.common.unet1d import UNet1DConfig
from training.models.subgoal import StoredSubgoalPolicy, SubgoalConfig, SubgoalNetwork, SusiePolicy
from training.optim import OptimConfig, ScheduleConfig
from training.recipes.picture_task import POLICY_LIMITS, PictureRunConfig, PictureTask
from training.recipes.unipi import Reconstruction


class SusieRunConfig(PictureRunConfig):
    """A whole run. `video` is the export or diffusers folder of the video model; its size is filled into `network`.

    A goal in training lies between `goal_offset[0]` and `goal_offset[1]` frames ahead, the last frame of the episode at
    most; without it as far as in use: (T - 1) x stride of the video model, less the steps since the goal was imagined.
    `goals`: "reconstructed" ones have passed the video model's autoencoder, as all that it imagines has.
    """

    kind: Literal["train-susie"] = "train-susie"
    video: str = Field(min_length=1)
    network: SubgoalConfig = SubgoalConfig()
    plan: PlanConfig = PlanConfig()
    goals: Literal["real", "reconstructed"] = "reconstructed"
    goal_offset: tuple[int, int] | None = None
    subgoal_every: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.data.cameras) > 1:
            raise ValueError(f"a video model sees one camera, data.cameras has {self.data.cameras}")
        if self.goal_offset is not None and not 1 <= self.goal_offset[0] <= self.goal_offset[1]:
            raise ValueError(f"goal_offset {self.goal_offset} is no rising pair of frames ahead")
        if self.subgoal_every % self.network.execute:
            raise ValueError(f"subgoal_every {self.subgoal_every} is no multiple of execute {self.network.execute}")
        return self

    def build_task(self) -> SusieTask:
        """Open the episodes; the video model is loaded when it is first needed."""
        return SusieTask(self)


def tiny(*, video: str, data: str, output: str, camera: str = "main", stride: int = 4) -> SusieRunConfig:
    """One CPU core, minutes. `stride` is the video model's: 4 for finetune's tiny preset."""
    return SusieRunConfig(
        output=output,
        video=video,
        data=PictureDataConfig(url=data, cameras=(camera,)),
        network=SubgoalConfig(
            vision=ResNetConfig(width=16, blocks=(1, 1), group_channels=8),
            unet=UNet1DConfig(channels=(64, 128), step_dim=64),
            chunk=8,
            execute=4,
        ),
        plan=PlanConfig(num_steps=10, stride=stride),
        subgoal_every=8,
        optim=OptimConfig(lr=1e-3, betas=(0.95, 0.999), weight_decay=1e-6, ema_decay=0.99),
        schedule=ScheduleConfig(epochs=None, warmup_epochs=0, steps=2000, warmup_steps=50),
        log_every_steps=25,
        checkpoint=CheckpointConfig(every_steps=500),
        # Minutes of training: a group of workers would take longer to start than it saves.
        compute=ComputeConfig(workers=0),
    )


class SusieTask(PictureTask):
    """Windows with goals into the error of the predicted noise."""

    config: SusieRunConfig

    def __init__(self, config: SusieRunConfig) -> None:
        self.reference = video_reference(config.video)
        sizes = video_sizes(config.video)
        self.goal_offset = config.goal_offset or goal_offset(config, sizes.num_frames)
        super().__init__(
            config,
            plan=WindowPlan(
                spans=((0, 0), self.goal_offset),
                size=sizes.image_size,
                crop=config.network.crop,
                train_steps=config.network.diffusion.train_steps,
            ),
            chunk=config.network.chunk,
            antialias=False,
            models=(self.reference.digest,),
        )

    @property
    def network_config(self) -> SubgoalConfig:
        """The configured network with the sizes of the video model and of these episodes."""
        found = {**self.widths, "image_size": self.plan.size}
        return SubgoalConfig.parse(self.config.network.to_json() | found)

    @cached_property
    def stores(self) -> tuple[EpisodePictures, ...]:
        """The present as it is, goals as the video model would show them."""
        present = self.pictures()
        if self.config.goals == "real":
            return present, present
        return present, self.pictures(Reconstruction(self.config.video))

    def build_model(self) -> SubgoalNetwork:
        """Fresh weights from the global generator."""
        return SubgoalNetwork(self.network_config)

    def loss(self, model: nn.Module, batch: PictureBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """Mean squared error of the predicted noise over the actions that exist."""
        assert isinstance(model, SubgoalNetwork)
        seen = batch.to(device)
        assert seen.steps is not None and seen.noise is not None
        loss = model.loss(
            seen.images[:, 0], seen.states[:, 0],
            targets_BKD=seen.targets, steps_B=seen.steps, noise_BKD=seen.noise, mask_BK=seen.mask,
        )  # fmt: skip
        return {"loss": loss}

    def export(self, folder: str, model: nn.Module, *, summary: dict[str, Any]) -> str:
        """Publish the policy; the video model is named by digest."""
        assert isinstance(model, SubgoalNetwork)
        stored = StoredSubgoalPolicy(
            network=model.config,
            codec=self.codec,
            video=self.reference,
            plan=self.config.plan,
            camera=self.config.data.cameras[0],
            subgoal_every=self.config.subgoal_every,
            seed=self.config.seed,
        )
        video = load_video_model(self.config.video)
        facts = {
            "video model": f"{self.reference.digest} (was at {self.reference.url})",
            "goals": f"{self.config.goals}, {self.goal_offset[0]} to {self.goal_offset[1]} frames ahead",
        }
        return save_policy(
            folder,
            SusiePolicy(model, video, stored, noise_shape=noise_shape(video)),
            title="Susie style policy",
            summary="A diffusion policy that goes where a video model's last frame shows it (Black 2023).",
            facts=self.facts(summary) | facts,
            limits=POLICY_LIMITS,
            inputs=self.inputs,
        )


def goal_offset(config: SusieRunConfig, num_frames: int) -> tuple[int, int]:
    """(least, most) frames between the present and the goal in use: the last frame of a plan comes nearer."""
    ahead = (num_frames - 1) * config.plan.stride
    return max(1, ahead - config.subgoal_every + config.network.execute), ahead
