"""Weights under the official key names, which are also ours: reading a foreign checkpoint is a prefix away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from training.models.common.vit import ENCODER_PREFIXES

WRAPPER_PREFIXES = ("module.", "backbone.", "base_encoder.")


def official_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint (under key `model` if there is one) without the wrappers' prefixes."""
    state = checkpoint["model"] if isinstance(checkpoint.get("model"), Mapping) else checkpoint
    return {_strip(name): torch.as_tensor(value) for name, value in state.items()}


def encoder_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Only the encoder: the names that timm's and DINO's vision transformers share."""
    weights = official_weights(checkpoint)
    return {name: value for name, value in weights.items() if name.startswith(ENCODER_PREFIXES)}


def _strip(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in WRAPPER_PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name
