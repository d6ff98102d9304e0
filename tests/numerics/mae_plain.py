"""Masked autoencoding stated once more in plain tensor arithmetic, patch by patch in image order, no module.

Takes the weights as a dictionary under the official names and the mask noise as an argument. Slow and obvious on
purpose: the model is compared with it, in value and gradient.
"""

from __future__ import annotations

import torch
from torch.nn.functional import conv2d, gelu

Weights = dict[str, torch.Tensor]


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]


def transformer(w: Weights, prefix: str, x: torch.Tensor, *, depth: int, heads: int) -> torch.Tensor:
    batch, rows, width = x.shape
    for i in range(depth):
        at = f"{prefix}blocks.{i}"
        qkv = linear(w, f"{at}.attn.qkv", norm(w, f"{at}.norm1", x)).reshape(batch, rows, 3, heads, width // heads)
        q, k, v = qkv.unbind(2)
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / (width // heads) ** 0.5
        mixed = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v).reshape(batch, rows, width)
        x = x + linear(w, f"{at}.attn.proj", mixed)
        x = x + linear(w, f"{at}.mlp.fc2", gelu(linear(w, f"{at}.mlp.fc1", norm(w, f"{at}.norm2", x))))
    return norm(w, f"{prefix}norm", x)


def mae_loss(w: Weights, images: torch.Tensor, noise: torch.Tensor, config) -> torch.Tensor:
    patch, num_patches = config.patch_size, noise.shape[1]
    num_kept = int(num_patches * (1 - config.mask_ratio))
    embedded = conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    embedded = embedded.flatten(2).transpose(1, 2) + w["pos_embed"][:, 1:]
    losses = []
    for image, rows, draw in zip(images, embedded, noise, strict=True):
        kept = sorted(draw.argsort()[:num_kept].tolist())
        hidden = [place for place in range(num_patches) if place not in kept]
        first = w["cls_token"][0] + w["pos_embed"][0, :1]
        seen = transformer(w, "", torch.cat([first, rows[kept]])[None], depth=config.depth, heads=config.num_heads)[0]
        seen = linear(w, "decoder_embed", seen)
        full = [w["mask_token"][0, 0]] * num_patches
        for row, place in enumerate(kept):
            full[place] = seen[1 + row]
        sequence = torch.stack([seen[0], *full])[None] + w["decoder_pos_embed"]
        decoded = transformer(w, "decoder_", sequence, depth=config.decoder_depth, heads=config.decoder_num_heads)
        predicted = linear(w, "decoder_pred", decoded)[0, 1:]
        for place in hidden:
            row, column = divmod(place, image.shape[2] // patch)
            tile = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            target = tile.permute(1, 2, 0).flatten()
            if config.norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
            losses.append(((predicted[place] - target) ** 2).mean())
    return torch.stack(losses).mean()
