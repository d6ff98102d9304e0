"""The video autoencoder's frames <-> latents, in chunks, always in full precision.

Shape letters: N frames, B clips, T frames of a clip, C latent channels, H, W pixels, h, w latents.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from infra.digests import sha256_bytes, sha256_json
from training.models.tvp.config import VAEConfig
from training.models.tvp.schedule import full_precision

ENCODE_CHUNK = 16


def random_autoencoder(config: VAEConfig) -> Any:
    """A fresh AutoencoderKLTemporalDecoder of these sizes."""
    from diffusers import AutoencoderKLTemporalDecoder

    levels = len(config.block_out_channels)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        sample_size=config.sample_size,
        scaling_factor=config.scaling_factor,
    )
    return on_one_device(vae)


def on_one_device(module: nn.Module) -> nn.Module:
    """The module, wholly on the meta device if part of it is: diffusers builds its mixing factors on the CPU always."""
    return module.to("meta") if any(weight.is_meta for weight in module.parameters()) else module


def autoencoder_digest(vae: nn.Module) -> str:
    """sha256 of the encoder's weights: equal digests give equal unscaled latents, whatever folder they came from."""
    parts = {
        name: sha256_bytes(value.detach().cpu().float().contiguous().numpy().tobytes())
        for name, value in vae.state_dict().items()
        if name.startswith(("encoder.", "quant_conv."))
    }
    return sha256_json(parts)


@torch.no_grad()
def encode_frames(
    vae: Any, pixels_N3HW: torch.Tensor, *, chunk: int = ENCODE_CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in [-1, 1] -> mean and deviation of the posterior, (N, C, h, w) each, not scaled."""
    parts = []
    with exact(pixels_N3HW.device):
        for start in range(0, len(pixels_N3HW), chunk):
            posterior = vae.encode(pixels_N3HW[start : start + chunk].to(vae.dtype)).latent_dist
            parts.append((full_precision(posterior.mean), full_precision(posterior.std)))
    return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])


@torch.no_grad()
def decode_clips(vae: Any, latents_BTChw: torch.Tensor, *, chunk: int) -> torch.Tensor:
    """Unscaled latents -> pixels (B, T, 3, H, W), about [-1, 1]. `chunk` frames of a clip are decoded together."""
    parts = []
    with exact(latents_BTChw.device):
        for start in range(0, latents_BTChw.shape[1], chunk):
            part = latents_BTChw[:, start : start + chunk]
            decoded = vae.decode(part.flatten(0, 1).to(vae.dtype), num_frames=part.shape[1]).sample
            parts.append(full_precision(decoded).unflatten(0, part.shape[:2]))
    return torch.cat(parts, dim=1)


def exact(device: torch.device) -> Any:
    """A context without autocast."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


class FrozenVAE:
    """A trained autoencoder with what it takes to use it. `digest` is that of `autoencoder_digest`.

    Latents here are not scaled; times `scale` they have about unit deviation.
    """

    def __init__(self, vae: Any, config: VAEConfig, *, image_size: int) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.config = config
        self.image_size = image_size
        self.scale = config.scaling_factor
        self.digest = autoencoder_digest(vae)

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; frames follow them."""
        self.vae.to(device)
        return self

    def encode(self, pixels_N3HW: torch.Tensor, *, chunk: int = ENCODE_CHUNK) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels in [-1, 1] -> mean and deviation (N, C, h, w), not scaled, on the weights' device."""
        return encode_frames(self.vae, pixels_N3HW.to(self.vae.device), chunk=chunk)

    def decode(self, latents_BTChw: torch.Tensor, *, chunk: int) -> torch.Tensor:
        """Unscaled latents -> pixels (B, T, 3, H, W) in [-1, 1]."""
        return decode_clips(self.vae, latents_BTChw.to(self.vae.device), chunk=chunk).clamp(-1, 1)
