"""A tiny RSP model with every parameter off its initial value, and its export."""

from __future__ import annotations

from pathlib import Path

import torch

from training.export import model_card, save_export
from training.models.common.images import Preprocessing
from training.models.rsp import RSP, RSPConfig

CONFIG = RSPConfig(
    image_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, decoder_embed_dim=32, decoder_depth=2,
    decoder_num_heads=2, num_latents=4, num_classes=4,
)  # fmt: skip


def perturbed(config: RSPConfig = CONFIG) -> RSP:
    torch.manual_seed(1)
    model = RSP(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    return model.eval()


def export_rsp(folder: str | Path, model: RSP) -> str:
    return save_export(
        folder,
        kind="rsp",
        model_config=model.config,
        weights=model.state_dict(),
        preprocessing=Preprocessing(image_size=model.config.image_size),
        card=model_card("Tiny", summary="A test.", facts={"steps": 3}, limits="None."),
        inputs=["data-digest"],
    )
