"""Small video models for tests, with every one-dimensional weight moved off its start so that a forgotten one shows."""

from __future__ import annotations

import torch

from training.models.tvp import TextGuidedVideoModel, TVPConfig, UNetConfig, VAEConfig
from training.models.tvp.model import random_unet

TINY = TVPConfig(
    unet=UNetConfig(
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        num_attention_heads=(2, 4, 4),
        cross_attention_dim=768,
        addition_time_embed_dim=8,
        sample_size=8,
    ),
    vae=VAEConfig(block_out_channels=(32, 32, 32), layers_per_block=1, sample_size=32, scaling_factor=0.4),
    num_frames=4,
    image_size=32,
    decode_chunk=3,
)


def tiny_model(config: TVPConfig = TINY, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> TextGuidedVideoModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TextGuidedVideoModel.random(config).to(dtype)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim <= 1:
                    weight.add_(0.1 * torch.randn_like(weight))
    return model


def untouched_unet(model: TextGuidedVideoModel, config: TVPConfig = TINY):
    """diffusers' own UNet with the model's weights, without what the model adds to its attention."""
    unet = random_unet(config.unet).to(model.unet.dtype)
    unet.load_state_dict(model.unet.state_dict())
    return unet


def randoms(seed: int, dtype: torch.dtype = torch.float32):
    """A function shape -> unit normal tensor."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
