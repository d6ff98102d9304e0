"""Runs small enough to be repeated many times: seconds of a step become milliseconds, everything else is as usual."""

from __future__ import annotations

from infra.config import override
from training.recipes import rsp
from training.recipes.rsp import PretrainConfig

SMALL = (
    "model.image_size=32",
    "data.image_size=32",
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.decoder_embed_dim=16",
    "model.decoder_depth=1",
    "model.decoder_num_heads=2",
    "model.num_latents=4",
    "model.num_classes=4",
    "global_batch_size=4",
    "schedule.epochs=null",
    "schedule.warmup_epochs=0",
    "schedule.steps=12",
    "schedule.warmup_steps=3",
    "checkpoint.every_steps=3",
    "optim.ema_decay=0.9",
    "log_every_steps=1",
    "compute.workers=0",
    "compute.matmul=default",
)


def small_pretrain(data: str, output: object, *assignments: str) -> PretrainConfig:
    """The tiny recipe, smaller still: 12 steps of 4 clips, saved every 3, in this process."""
    return override(rsp.tiny(data=data, output=str(output)), (*SMALL, *assignments))
