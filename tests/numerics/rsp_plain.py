"""RSP stated once more in plain tensor arithmetic, straight from the facts sheet: three full passes, no module.

Takes the weights as a dictionary under the official names and every draw as an argument. Slow and obvious on purpose:
the model is compared with it, in value and gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import conv2d, gelu

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PlainDraws:
    noise: torch.Tensor
    posterior: torch.Tensor  # one-hot
    prior: torch.Tensor
    mask: torch.Tensor


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + 1e-6) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    batch, rows, width = q.shape
    q, k, v = (x.reshape(batch, -1, heads, width // heads) for x in (q, k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * (width // heads) ** -0.5
    return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v).reshape(batch, rows, width)


def mlp(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return linear(w, f"{name}.fc2", gelu(linear(w, f"{name}.fc1", x)))


def self_attention(w: Weights, name: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = linear(w, f"{name}.qkv", x).chunk(3, -1)
    return linear(w, f"{name}.proj", attend(q, k, v, heads))


def encoder(w: Weights, images: torch.Tensor, *, patch: int, depth: int, heads: int, keep: torch.Tensor | None = None):
    x = conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"][:, 1:]
    if keep is not None:
        x = torch.stack([sample[index] for sample, index in zip(x, keep, strict=True)])
    first = (w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = torch.cat([first, x], 1)
    for i in range(depth):
        x = x + self_attention(w, f"blocks.{i}.attn", norm(w, f"blocks.{i}.norm1", x), heads)
        x = x + mlp(w, f"blocks.{i}.mlp", norm(w, f"blocks.{i}.norm2", x))
    return norm(w, "norm", x)


def decoder(w: Weights, memory: torch.Tensor, *, depth: int, heads: int) -> torch.Tensor:
    x = w["mask_token"].expand(len(memory), w["decoder_pos_embed"].shape[1], -1) + w["decoder_pos_embed"]
    for i in range(depth):
        at = f"decoder_blocks.{i}"
        q = linear(w, f"{at}.cattn.q", norm(w, f"{at}.norm1", x))
        k, v = linear(w, f"{at}.cattn.kv", norm(w, f"{at}.norm_kv1", memory)).chunk(2, -1)
        x = x + linear(w, f"{at}.cattn.proj", attend(q, k, v, heads))
        x = x + self_attention(w, f"{at}.attn", norm(w, f"{at}.norm3", x), heads)
        x = x + mlp(w, f"{at}.mlp2", norm(w, f"{at}.norm4", x))
    return linear(w, "decoder_pred", norm(w, "decoder_norm", x))[:, 1:]


def target_patches(images: torch.Tensor, patch: int) -> torch.Tensor:
    tiles = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, C, rows, columns, p, p)
    patches = tiles.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5


def head(w: Weights, name: str, x: torch.Tensor, latents: int) -> torch.Tensor:
    logits = linear(w, f"{name}.2", linear(w, f"{name}.0", x).relu())
    return logits.reshape(len(x), latents, -1)


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    return (p * (p.log() - q.log())).sum((1, 2))


def rsp_losses(w: Weights, current: torch.Tensor, future: torch.Tensor, draws: PlainDraws, config) -> dict:
    """Losses of the paper's three-pass step (posterior, prior without gradient, masked) and what they came from."""
    sizes = {"patch": config.patch_size, "depth": config.depth, "heads": config.num_heads}
    inner = {"depth": config.decoder_depth, "heads": config.decoder_num_heads}
    places = w["decoder_pos_embed"]
    h_current = encoder(w, current, **sizes)
    h_noisy = encoder(w, future + config.noise_scale * draws.noise, **sizes)

    post = head(w, "to_posterior", torch.cat([h_current[:, 0], h_noisy[:, 0]], -1), config.num_latents)
    prior = head(w, "to_prior", h_current[:, 0], config.num_latents)
    a = config.kl_balance
    kl_value = (a * kl(post.detach(), prior) + (1 - a) * kl(post, prior.detach())).mean()
    loss_kl = kl_value if kl_value > config.free_bits else torch.full_like(kl_value, config.free_bits)

    def predict(logits: torch.Tensor, one_hot: torch.Tensor) -> torch.Tensor:
        probabilities = logits.softmax(-1)
        z = (one_hot + probabilities - probabilities.detach()).flatten(1)
        source = linear(w, "decoder_embed_deter", h_current) + places
        return decoder(w, torch.cat([linear(w, "decoder_embed_stoch", z)[:, None], source], 1), **inner)

    target = target_patches(future, config.patch_size)
    loss_future = ((predict(post, draws.posterior) - target) ** 2).mean()
    with torch.no_grad():
        loss_prior = ((predict(prior, draws.prior) - target) ** 2).mean()

    kept = int(config.num_patches * (1 - config.mask_ratio))
    shuffle = draws.mask.argsort(1)
    restore = shuffle.argsort(1)
    visible = encoder(w, future, **sizes, keep=shuffle[:, :kept])
    rows = linear(w, "decoder_embed_mae", visible)
    filler = w["mask_token"].expand(len(rows), config.num_patches - kept, -1)
    shuffled = torch.cat([rows[:, 1:], filler], 1)
    ordered = torch.stack([sample[index] for sample, index in zip(shuffled, restore, strict=True)])
    masked = decoder(w, torch.cat([rows[:, :1], ordered], 1) + places, **inner)
    removed = (restore >= kept).to(masked.dtype)
    loss_masked = (((masked - target) ** 2).mean(-1) * removed).sum() / removed.sum()

    return {
        "loss": loss_future + config.kl_scale * loss_kl + loss_masked,
        "loss_future": loss_future,
        "loss_kl": loss_kl,
        "kl": kl_value,
        "loss_masked": loss_masked,
        "loss_prior": loss_prior,
    }
