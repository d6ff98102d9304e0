"""Diffusion Policy (Chi 2023), CNN variant: pictures, proprioception and sentence condition a denoised action chunk.

Shape letters: B batch, V cameras, T history (oldest first), S side, P proprioception, G sentence width, K chunk, D
action target, C condition width, R draws of a sample.
"""

from __future__ import annotations

import torch
from torch import nn

from training.models.common.ddpm import ChunkDiffusion
from training.models.common.pictures import to_unit_range
from training.models.common.resnet import ResNetEncoder
from training.models.common.unet1d import ConditionalUNet1D
from training.models.diffusion_policy.config import DiffusionPolicyConfig


class DiffusionPolicyNetwork(nn.Module):
    """One ResNet a camera and the denoiser, trained together. Everything is in the codec's normalised units."""

    def __init__(self, config: DiffusionPolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList(ResNetEncoder(config.vision) for _ in config.cameras)
        unet = ConditionalUNet1D(config.unet, action_dim=config.action_dim, condition_dim=config.condition_dim)
        self.head = ChunkDiffusion(unet, config.diffusion)

    def condition(self, images_BVTSSC: torch.Tensor, states_BTP: torch.Tensor, text_BG: torch.Tensor) -> torch.Tensor:
        """uint8 pictures at the size that is seen, states and sentence vectors -> (B, C)."""
        batch, _, history = images_BVTSSC.shape[:3]
        parts = [
            encoder(to_unit_range(view.flatten(0, 1))).view(batch, history, -1)
            for encoder, view in zip(self.encoders, images_BVTSSC.unbind(1), strict=True)
        ]
        if self.config.proprioception_dim:
            parts.append(states_BTP)
        seen = torch.cat(parts, dim=-1).flatten(1)
        # Unit vectors as they are: 384 channels of unit deviation would outshout 64 of vision.
        return torch.cat([seen, text_BG], dim=-1)

    def loss(
        self,
        images_BVTSSC: torch.Tensor,
        states_BTP: torch.Tensor,
        text_BG: torch.Tensor,
        *,
        targets_BKD: torch.Tensor,
        steps_B: torch.Tensor,
        noise_BKD: torch.Tensor,
        mask_BK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean squared error of the predicted noise over the actions that exist."""
        condition = self.condition(images_BVTSSC, states_BTP, text_BG)
        return self.head.loss(condition, targets_BKD, steps_B=steps_B, noise_BKD=noise_BKD, mask_BK=mask_BK)
