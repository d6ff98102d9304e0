"""The Video Prediction Policy's trained part as plain equations on a dictionary of weights, written from the paper and
a description of the released code, without the package.

Nothing is cached, folded or joined: the context is encoded again at every sampling step, and each layer normalises
its media anew, as in the release. It is therefore also the reference side of the benchmark.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch.nn.functional import gelu, mish, silu


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(x, weight, bias=None):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + 1e-5) * weight
    return y if bias is None else y + bias


def named_norm(w, name, x):
    return norm(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attention(q, k, v, heads, visible=None):
    """(B, N, D), (B, S, D) -> (B, N, D); `visible` (N, S) bool."""
    split = lambda x: x.reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)  # noqa: E731
    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    out = scores.softmax(-1) @ v
    return out.permute(0, 2, 1, 3).flatten(2)


def embed(w, name, x):
    return linear(w, f"{name}.2", gelu(linear(w, f"{name}.0", x)))


def video_former(w, features, *, depth, heads, temporal=True, mask=None, extra=None):
    """(B, T, N, C) -> (B, T Q, D)."""
    b, t, _, _ = features.shape
    media = embed(w, "goal_emb", features)
    if extra is not None:
        media = torch.cat([media, extra[:, None].repeat(1, t, 1, 1)], dim=2)
    times = w["time_pos_emb"][None].repeat(b, 1, 1, 1)
    if mask is not None:
        times = torch.where(mask[:, :, None, None], times, torch.zeros_like(times))
    media = (media + times).flatten(0, 1)
    latents = w["latents"][None].repeat(b, 1, 1, 1).flatten(0, 1)  # (B T, Q, D)
    places = latents.shape[1]
    for n in range(depth):
        look = f"layers.{n}.0"
        x = named_norm(w, f"{look}.norm_media", media)
        own = named_norm(w, f"{look}.norm_latents", latents)
        seen = torch.cat([x, own], dim=1)
        out = attention(
            linear(w, f"{look}.to_q", own), linear(w, f"{look}.to_k", seen), linear(w, f"{look}.to_v", seen), heads
        )
        latents = latents + linear(w, f"{look}.to_out", out)
        if temporal:
            rows = latents.reshape(b, t, places, -1).permute(0, 2, 1, 3).flatten(0, 1)  # (B Q, T, D)
            q, k, v = linear(w, f"layers.{n}.1.qkv", rows).chunk(3, dim=-1)
            rows = rows + linear(w, f"layers.{n}.1.proj", attention(q, k, v, heads))
            latents = rows.reshape(b, places, t, -1).permute(0, 2, 1, 3).flatten(0, 1)
        forward = f"layers.{n}.{2 if temporal else 1}"
        hidden = gelu(linear(w, f"{forward}.1", named_norm(w, f"{forward}.0", latents)))
        latents = latents + linear(w, f"{forward}.3", hidden)
    return named_norm(w, "norm", latents).reshape(b, t * places, -1)


def multi_head(w, name, x, *, heads, visible=None, over=None):
    over = x if over is None else over
    q, k, v = (linear(w, f"{name}.{part}", rows) for part, rows in (("query", x), ("key", over), ("value", over)))
    return linear(w, f"{name}.c_proj", attention(q, k, v, heads, visible))


def perceptron(w, name, x):
    return linear(w, f"{name}.c_proj", gelu(linear(w, f"{name}.c_fc", x)))


def encode(w, tokens, goal, proprioception=None, *, layers, heads):
    rows = [embed(w, "lang_emb", goal), linear(w, "tok_emb", tokens)]
    if proprioception is not None:
        rows.append(embed(w, "proprio_emb", proprioception))
    x = torch.cat(rows, dim=1)
    for n in range(layers):
        block = f"encoder.blocks.{n}"
        x = x + multi_head(w, f"{block}.attn", named_norm(w, f"{block}.ln_1", x), heads=heads)
        x = x + perceptron(w, f"{block}.mlp", named_norm(w, f"{block}.ln_2", x))
    return named_norm(w, "encoder.ln", x)


def noise_token(w, times):
    """(B,) -> (B, 1, D)."""
    half = w["sigma_emb.1.weight"].shape[1] // 2
    frequencies = torch.exp(torch.arange(half, dtype=times.dtype) * (-math.log(10000) / (half - 1)))
    angles = times[:, None] * frequencies[None]
    code = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    return linear(w, "sigma_emb.3", mish(linear(w, "sigma_emb.1", code)))[:, None]


def decode(w, scaled, times, context, *, layers, heads, causal_context=True):
    """The network's raw output for scaled noisy actions (B, K, A) at times ln(sigma) / 4 (B,)."""
    x = linear(w, "action_emb", scaled)
    token = noise_token(w, times)
    k, s = x.shape[1], context.shape[1]
    before = torch.arange(k)[:, None] >= torch.arange(k)[None]
    sees = torch.arange(k)[:, None] >= torch.arange(s)[None] if causal_context else None
    for n in range(layers):
        block = f"decoder.blocks.{n}"
        six = linear(w, f"{block}.adaLN_zero.modulation.1", silu(token)).chunk(6, dim=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = six
        y = shift_1 + named_norm(w, f"{block}.ln_1", x) * scale_1
        x = x + gate_1 * multi_head(w, f"{block}.attn", y, heads=heads, visible=before)
        asking = named_norm(w, f"{block}.ln3", x)
        x = x + multi_head(w, f"{block}.cross_att", asking, heads=heads, visible=sees, over=context)
        y = shift_2 + named_norm(w, f"{block}.ln_2", x) * scale_2
        x = x + gate_2 * perceptron(w, f"{block}.mlp", y)
    return linear(w, "action_pred", named_norm(w, "decoder.ln", x))


def factors(sigma, data=0.5):
    total = sigma**2 + data**2
    return data**2 / total, sigma * data / total**0.5, 1 / total**0.5


def denoised(w, tokens, goal, noisy, sigma, *, proprioception=None, **sizes):
    """D(x; sigma), everything computed anew. `sigma` (B,)."""
    skip, out, scale = (value[:, None, None] for value in factors(sigma))
    context = encode(w, tokens, goal, proprioception, layers=sizes["encoder_layers"], heads=sizes["heads"])
    raw = decode(
        w, noisy * scale, sigma.log() / 4, context,
        layers=sizes["decoder_layers"], heads=sizes["heads"], causal_context=sizes.get("causal_context", True),
    )  # fmt: skip
    return skip * noisy + out * raw


def loss_elements(w, tokens, goal, actions, *, sigma, noise, proprioception=None, **sizes):
    """(B, K, A) squared error of the raw output, clip by clip."""
    errors = []
    for n in range(len(actions)):
        noisy = actions[n : n + 1] + sigma[n] * noise[n : n + 1]
        skip, out, scale = factors(float(sigma[n]))
        state = None if proprioception is None else proprioception[n : n + 1]
        context = encode(
            w, tokens[n : n + 1], goal[n : n + 1], state, layers=sizes["encoder_layers"], heads=sizes["heads"]
        )
        raw = decode(
            w, scale * noisy, sigma[n : n + 1].log() / 4, context,
            layers=sizes["decoder_layers"], heads=sizes["heads"], causal_context=sizes.get("causal_context", True),
        )  # fmt: skip
        errors.append((raw - (actions[n : n + 1] - skip * noisy) / out) ** 2)
    return torch.cat(errors)


def exponential(steps, low, high):
    return [math.exp(math.log(high) + n / (steps - 1) * (math.log(low) - math.log(high))) for n in range(steps)] + [0.0]


def karras(steps, low, high, rho=7):
    ends = high ** (1 / rho), low ** (1 / rho)
    return [(ends[0] + n / (steps - 1) * (ends[1] - ends[0])) ** rho for n in range(steps)] + [0.0]


def ddim(denoise, x, sigmas):
    """First-order DPM-Solver in t = -ln(sigma), as released. Returns the chunk and every denoised value."""
    seen = []
    for now, following in pairwise(sigmas):
        d = denoise(x, now)
        seen.append(d)
        if following == 0:
            x = d
        else:
            h = -math.log(following) + math.log(now)
            x = following / now * x - math.expm1(-h) * d
    return x, torch.stack(seen)
