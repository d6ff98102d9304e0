"""Inverse dynamics (Uni-Pi, Du 2023): which actions lie between two frames.

Shape letters: B pairs, S side, P proprioception, K actions between two frames, D action target.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from training.models.common.mlp import Perceptron
from training.models.common.pictures import to_unit_range
from training.models.common.resnet import ResNetEncoder
from training.models.inverse_dynamics.config import InverseDynamicsConfig


class InverseDynamicsNetwork(nn.Module):
    """Both frames on the channels of one ResNet, then a perceptron. Actions are in the codec's normalised units."""

    def __init__(self, config: InverseDynamicsConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ResNetEncoder(config.vision, in_channels=6)
        inputs = config.vision.feature_dim + config.proprioception_dim
        self.perceptron = Perceptron(inputs, config.hidden, config.actions_per_pair * config.action_dim)

    def forward(self, frames_B2SSC: torch.Tensor, state_BP: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 frames (B, 2, S, S, 3) -> normalised actions (B, K, D); `state` is that of the first frame."""
        parts = [self.encoder(to_unit_range(frames_B2SSC).flatten(1, 2))]
        if self.config.proprioception_dim:
            assert state_BP is not None, "proprioception_dim > 0 needs states"
            parts.append(state_BP)
        actions = self.perceptron(torch.cat(parts, dim=-1))
        return actions.unflatten(-1, (self.config.actions_per_pair, self.config.action_dim))

    def loss(
        self, frames_B2SSC: torch.Tensor, targets_BKD: torch.Tensor, *, state_BP: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean error in normalised units."""
        error = F.mse_loss if self.config.loss == "mse" else F.smooth_l1_loss
        return error(self(frames_B2SSC, state_BP).float(), targets_BKD)
