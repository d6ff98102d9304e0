"""Behaviour cloning on frozen features, proprioception and a sentence vector, with action chunks.

Sources: CortexBench (VC-1, 2023) for FLARE fusion and the batch-norm MLP; chunks as in ACT (2023).
Shape letters: B batch, T history (oldest first), N tokens, D feature width, P proprioception, E sentence width,
C chunk, A action.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from training.models.common.mlp import Perceptron
from training.models.policies.config import BehaviourCloningConfig

DEVIATION_FLOOR = 1e-4  # a channel that never moves is left at its own scale
ROWS_AT_ONCE = 1 << 16


class HasMoments(Protocol):
    """Anything with a mean and a deviation per channel."""

    @property
    def mean(self) -> Any:
        """(D,)."""
        ...

    @property
    def std(self) -> Any:
        """(D,)."""
        ...


class Moments(NamedTuple):
    """Mean and deviation per channel, (D,) float32 each."""

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, values: npt.NDArray[np.floating] | torch.Tensor) -> Self:
        """Over all axes but the last."""
        rows = torch.as_tensor(values).flatten(0, -2)
        mean = rows.mean(dim=0, dtype=torch.float64)
        # In pieces: patch tokens of a whole data set do not fit in memory twice.
        squares = sum((part.double() - mean).square().sum(dim=0) for part in rows.split(ROWS_AT_ONCE))
        std = (squares / len(rows)) ** 0.5
        return cls(mean.float(), torch.where(std < DEVIATION_FLOOR, 1.0, std).float())


class BehaviourCloningHead(nn.Module):
    """Features, proprioception, sentence -> action chunk. Statistics are buffers, so weights alone define it."""

    def __init__(self, config: BehaviourCloningConfig) -> None:
        super().__init__()
        self.config = config
        sizes = {
            "feature": config.feature_dim,
            "proprioception": config.proprioception_dim,
            "action": config.action_dim,
        }
        for name, size in sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        if config.feature == "patch_tokens":
            self.project = nn.Linear(config.feature_dim, config.token_dim)
        self.perceptron = Perceptron(
            config.input_dim, config.hidden, config.chunk * config.action_dim, batch_norm=config.batch_norm
        )

    def set_statistics(
        self,
        *,
        features: HasMoments | None = None,
        proprioception: HasMoments | None = None,
        actions: HasMoments | None = None,
    ) -> None:
        """Store the training set's moments.

        Those of features only if `standardise`; those of an input the policy does not have are ignored.
        """
        given = {"proprioception": proprioception, "action": actions}
        if self.config.standardise:
            given["feature"] = features
        for name, moments in given.items():
            if moments is not None and getattr(self, f"{name}_mean").numel():
                getattr(self, f"{name}_mean").copy_(torch.as_tensor(moments.mean))
                getattr(self, f"{name}_std").copy_(torch.as_tensor(moments.std))

    def forward(
        self,
        features: torch.Tensor | None,
        proprioception_BP: torch.Tensor,
        text_BE: torch.Tensor | None,
    ) -> torch.Tensor:
        """-> standardised actions (B, C, A).

        `features` is (B, T, D) class tokens or (B, T, N, D) patch tokens; None when the config has none.
        """
        parts = []
        if self.config.uses_images:
            assert features is not None, f"feature {self.config.feature!r} needs features"
            parts.append(self._fuse(self._reduce((features - self.feature_mean) / self.feature_std)))
        if self.config.proprioception_dim:
            parts.append((proprioception_BP - self.proprioception_mean) / self.proprioception_std)
        if self.config.text_dim:
            assert text_BE is not None, "text_dim > 0 needs sentence vectors"
            parts.append(text_BE * math.sqrt(self.config.text_dim))  # unit vectors to unit deviation per channel
        chunk = self.perceptron(torch.cat(parts, dim=-1))
        return chunk.unflatten(-1, (self.config.chunk, self.config.action_dim))

    def loss(
        self,
        features: torch.Tensor | None,
        proprioception_BP: torch.Tensor,
        text_BE: torch.Tensor | None,
        actions_BCA: torch.Tensor,
        mask_BC: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean error over the actions that exist, in standardised units.

        `actions` are in the environment's units; `mask` is False behind the end of an episode.
        """
        target = (actions_BCA - self.action_mean) / self.action_std
        predicted = self(features, proprioception_BP, text_BE).float()
        error = F.mse_loss if self.config.loss == "mse" else F.smooth_l1_loss
        errors_BC = error(predicted, target, reduction="none").mean(dim=-1)
        if mask_BC is None:
            return errors_BC.mean()
        weights = mask_BC.to(errors_BC.dtype)
        return (errors_BC * weights).sum() / weights.sum().clamp(min=1)

    @torch.no_grad()
    def predict(
        self, features: torch.Tensor | None, proprioception_BP: torch.Tensor, text_BE: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, C, A) in the environment's units, clamped to `action_range`."""
        actions = self(features, proprioception_BP, text_BE) * self.action_std + self.action_mean
        return actions.clamp(*self.config.action_range)

    def _reduce(self, features: torch.Tensor) -> torch.Tensor:
        """(B, T, D) as it is; (B, T, N, D) -> (B, T, frame_dim)."""
        if self.config.feature != "patch_tokens":
            return features
        maps = self.project(features)
        if self.config.reduction == "projection":
            return maps.flatten(-2)
        side = math.isqrt(self.config.num_tokens)
        weights = maps.softmax(dim=-2)
        ticks = torch.linspace(-1, 1, side, device=maps.device, dtype=maps.dtype)
        rows, columns = ticks.repeat_interleave(side)[:, None], ticks.repeat(side)[:, None]
        return torch.cat([(weights * columns).sum(dim=-2), (weights * rows).sum(dim=-2)], dim=-1)

    def _fuse(self, frames_BTF: torch.Tensor) -> torch.Tensor:
        """FLARE: the latest frame joined with the differences of neighbours; (B, T * F)."""
        if self.config.fusion == "last":
            return frames_BTF[:, -1]
        differences = frames_BTF[:, 1:] - frames_BTF[:, :-1]
        return torch.cat([differences, frames_BTF[:, -1:]], dim=1).flatten(1)
