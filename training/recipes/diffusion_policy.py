"""Diffusion Policy (Chi 2023) end to end from pixels.

    foreframe train-policy --method diffusion --preset tiny      minutes on one CPU core
    foreframe train-policy --method diffusion --preset paper     the published sizes: needs a GPU

`tiny` is the published recipe with smaller sizes and counts, and with the learning rate that so few steps need.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from infra.compute import ComputeConfig
from training.checkpoint import CheckpointConfig
from training.data.picture_windows import PictureBatch, PictureDataConfig, WindowPlan
from training.export_baselines import save_policy
from training.models.common.resnet import ResNetConfig
from training.models.common.unet1d import UNet1DConfig
from training.models.diffusion_policy import (
    DiffusionPolicy,
    DiffusionPolicyConfig,
    DiffusionPolicyNetwork,
    StoredDiffusionPolicy,
)
from training.optim import OptimConfig, ScheduleConfig
from training.recipes.picture_task import POLICY_LIMITS, PictureRunConfig, PictureTask

# Dotted keys in which the presets may differ: sizes, counts, the learning rate that suits the steps, where it runs.
SIZES_AND_COUNTS = (
    "network.image_size", "network.crop", "network.vision", "network.unet", "network.chunk", "network.execute",
    "network.history", "optim.lr", "optim.ema_decay", "schedule", "global_batch_size", "log_every_steps",
    "checkpoint.every_steps", "compute",
)  # fmt: skip
BETAS, WEIGHT_DECAY = (0.95, 0.999), 1e-6


class DiffusionPolicyRunConfig(PictureRunConfig):
    """A whole run. Cameras and the widths that the data decide are filled into `network` when it is built."""

    kind: Literal["train-diffusion-policy"] = "train-diffusion-policy"
    network: DiffusionPolicyConfig = DiffusionPolicyConfig()

    def build_task(self) -> DiffusionPolicyTask:
        """Open the episodes; pictures are decoded when they are first needed."""
        return DiffusionPolicyTask(self)


def paper(*, data: str, output: str, camera: str = "main") -> DiffusionPolicyRunConfig:
    """The published sizes for simulated pictures: 84 pixels of which 76 are seen, 16 actions of which 8 are done.

    The published run counts 3,050 passes; 100,000 steps of 64 windows stand for them. Its weight average starts fast
    and ends at 0.9999, here that is its decay throughout.
    """
    return DiffusionPolicyRunConfig(
        output=output,
        data=PictureDataConfig(url=data, cameras=(camera,)),
        optim=OptimConfig(lr=1e-4, betas=BETAS, weight_decay=WEIGHT_DECAY, ema_decay=0.9999),
        schedule=ScheduleConfig(epochs=None, warmup_epochs=0, steps=100_000, warmup_steps=500),
        checkpoint=CheckpointConfig(every_steps=5000),
        compute=ComputeConfig(workers=1, use_gpu=True, cpus_per_worker=8, loader_workers=6),
    )


def tiny(*, data: str, output: str, camera: str = "main") -> DiffusionPolicyRunConfig:
    """One CPU core, minutes: 64 pixels of which 58 are seen, 8 actions of which 4 are done."""
    return DiffusionPolicyRunConfig(
        output=output,
        data=PictureDataConfig(url=data, cameras=(camera,)),
        network=DiffusionPolicyConfig(
            image_size=64,
            crop=58,
            vision=ResNetConfig(width=16, blocks=(1, 1), group_channels=8),
            unet=UNet1DConfig(channels=(64, 128), step_dim=64),
            history=1,
            chunk=8,
            execute=4,
        ),
        optim=OptimConfig(lr=1e-3, betas=BETAS, weight_decay=WEIGHT_DECAY, ema_decay=0.99),
        schedule=ScheduleConfig(epochs=None, warmup_epochs=0, steps=2000, warmup_steps=50),
        log_every_steps=25,
        checkpoint=CheckpointConfig(every_steps=500),
        # Minutes of training: a group of workers would take longer to start than it saves.
        compute=ComputeConfig(workers=0),
    )


class DiffusionPolicyTask(PictureTask):
    """Windows into the error of the predicted noise."""

    config: DiffusionPolicyRunConfig

    def __init__(self, config: DiffusionPolicyRunConfig) -> None:
        network = config.network
        super().__init__(
            config,
            plan=WindowPlan(
                spans=tuple((offset, offset) for offset in network.history_offsets),
                size=network.image_size,
                crop=network.crop,
                train_steps=network.diffusion.train_steps,
            ),
            chunk=network.chunk,
            antialias=True,
            hears=network.text_dim > 0,
        )

    @property
    def network_config(self) -> DiffusionPolicyConfig:
        """The configured network with the cameras and widths of these episodes."""
        found: dict[str, Any] = {**self.widths, "cameras": list(self.config.data.cameras)}
        return DiffusionPolicyConfig.parse(self.config.network.to_json() | found)

    def build_model(self) -> DiffusionPolicyNetwork:
        """Fresh weights from the global generator."""
        return DiffusionPolicyNetwork(self.network_config)

    def loss(self, model: nn.Module, batch: PictureBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """Mean squared error of the predicted noise over the actions that exist."""
        assert isinstance(model, DiffusionPolicyNetwork)
        seen = batch.to(device)
        assert seen.steps is not None and seen.noise is not None
        loss = model.loss(
            seen.images, seen.states, seen.text,
            targets_BKD=seen.targets, steps_B=seen.steps, noise_BKD=seen.noise, mask_BK=seen.mask,
        )  # fmt: skip
        return {"loss": loss}

    def export(self, folder: str, model: nn.Module, *, summary: dict[str, Any]) -> str:
        """Publish the policy, whole."""
        assert isinstance(model, DiffusionPolicyNetwork)
        stored = StoredDiffusionPolicy(network=model.config, codec=self.codec, seed=self.config.seed)
        return save_policy(
            folder,
            DiffusionPolicy(model, stored),
            title="Diffusion Policy",
            summary="Action chunks denoised on pictures, proprioception and a sentence, trained end to end (Chi 2023).",
            facts=self.facts(summary),
            limits=POLICY_LIMITS,
            inputs=self.inputs,
        )
