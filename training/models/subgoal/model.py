"""Sub-goal policy (Susie, Black 2023): a goal picture, and the actions that lead there.

Shape letters: B batch, S side, P proprioception, K chunk, D action target, C condition width.
"""

from __future__ import annotations

import torch
from torch import nn

from training.models.common.ddpm import ChunkDiffusion
from training.models.common.pictures import to_unit_range
from training.models.common.resnet import ResNetEncoder
from training.models.common.unet1d import ConditionalUNet1D
from training.models.subgoal.config import SubgoalConfig


class SubgoalNetwork(nn.Module):
    """Present and goal stacked on channels, as in Susie's policy. Actions are in the codec's normalised units."""

    def __init__(self, config: SubgoalConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ResNetEncoder(config.vision, in_channels=6)
        unet = ConditionalUNet1D(config.unet, action_dim=config.action_dim, condition_dim=config.condition_dim)
        self.head = ChunkDiffusion(unet, config.diffusion)

    def condition(self, pictures_B2SSC: torch.Tensor, state_BP: torch.Tensor) -> torch.Tensor:
        """uint8 present and goal (B, 2, S, S, 3), and the present state -> (B, C)."""
        features = self.encoder(to_unit_range(pictures_B2SSC).flatten(1, 2))
        return torch.cat([features, state_BP], dim=-1) if self.config.proprioception_dim else features

    def loss(
        self,
        pictures_B2SSC: torch.Tensor,
        state_BP: torch.Tensor,
        *,
        targets_BKD: torch.Tensor,
        steps_B: torch.Tensor,
        noise_BKD: torch.Tensor,
        mask_BK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean squared error of the predicted noise over the actions that exist."""
        condition = self.condition(pictures_B2SSC, state_BP)
        return self.head.loss(condition, targets_BKD, steps_B=steps_B, noise_BKD=noise_BKD, mask_BK=mask_BK)
