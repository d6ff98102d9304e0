"""Weights of official MAE and VC-1 checkpoints, whose names are ours.

| file | holds |
| --- | --- |
| MAE `mae_pretrain_*.pth` | `{"model": ...}` with the encoder alone |
| MAE `mae_pretrain_*_full.pth`, and a run's `checkpoint-N.pth` | `{"model": ...}` with encoder and decoder |
| VC-1 `vc1_vitb.pth`, `vc1_vitl.pth` | `{"model": ...}`, which VC-1's own loader strips of any decoder |

Heads of a classifier (`head.*`, `fc_norm.*`) are no part of a masked autoencoder and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from infra.errors import InputError
from training.models.common.positions import resize_table
from training.models.common.vit import ENCODER_PREFIXES

DECODER_PREFIXES = (
    "decoder_embed.",
    "mask_token",
    "decoder_pos_embed",
    "decoder_blocks.",
    "decoder_norm.",
    "decoder_pred.",
)
_CLASSIFIER = ("head.", "fc_norm.")
_TABLES = ("pos_embed", "decoder_pos_embed")


def official_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint (under key `model` if there is one), without wrappers' prefixes or a classifier."""
    state = checkpoint["model"] if isinstance(checkpoint.get("model"), Mapping) else checkpoint
    named = {name.removeprefix("module."): value for name, value in state.items()}
    kept = {name: value for name, value in named.items() if not name.startswith(_CLASSIFIER)}
    if strange := [name for name, value in kept.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(
            f"{strange[0]} of the checkpoint is no tensor.", remedy="Give a checkpoint of MAE's or VC-1's layout."
        )
    return kept


def encoder_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's part of `weights`."""
    return {name: value for name, value in weights.items() if name.startswith(ENCODER_PREFIXES)}


def has_decoder(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether any of the decoder's weights are there."""
    return any(name.startswith(DECODER_PREFIXES) for name in weights)


def fit_tables(weights: Mapping[str, torch.Tensor], grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The weights with position tables of another (square) grid resized to `grid`, as VC-1's own loader does."""
    fitted = dict(weights)
    for name in _TABLES:
        table = weights.get(name)
        if table is None or table.ndim != 3 or table.shape[1] == 1 + grid[0] * grid[1]:
            continue
        side = math.isqrt(table.shape[1] - 1)
        if side * side != table.shape[1] - 1:
            raise InputError(f"{name} has {table.shape[1] - 1} patches, which are no square.", remedy="Check the file.")
        fitted[name] = resize_table(table.float(), (side, side), grid).to(table.dtype)
    return fitted
