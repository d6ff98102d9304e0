"""Video-Former: features of predicted frames to a few tokens a frame (VPP, stage 2).

Shape letters: B clips, T frames, N feature tokens of a frame, C their channels, E extra tokens, Q tokens of a frame
that come out, D width, S = N + E media tokens of a frame. In the cross-attention: F = B T frames, H heads, W width of a
head, I = H W, G = H Q, R = F Q.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from infra.errors import ConfigError
from training.models.common.weights import load_weights
from training.models.vpp.blocks import attend
from training.models.vpp.config import VideoFormerConfig
from training.models.vpp.official import former_weights, infer_former_config

EMBEDDING_RATIO = 2  # inner width of the feature embedding over `dim`


class PerceiverAttention(nn.Module):
    """A frame's latents look at its media and at themselves; each side has its own norm, no linear has a bias."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, latents_FQD: torch.Tensor, centred_FSD: torch.Tensor) -> torch.Tensor:
        """F = B T frames; `centred` is media of mean 0 and deviation 1, to which this layer's norm is yet to come.

        Queries are few and media many, so the key product is moved to the queries and the value product behind the
        weighted mean: q (W x) = (q W) x. Media then need no product of a layer's own, a quarter of the arithmetic.
        The norm's weight and bias move with them, so all layers share one normalisation.
        """
        scale, offset = self.norm_media.weight, self.norm_media.bias
        own_FQD = self.norm_latents(latents_FQD)
        asked_FGD = self._per_head(self.to_q(own_FQD) * self.head_dim**-0.5, self.to_k.weight)
        media_FGS = (asked_FGD * scale) @ centred_FSD.transpose(1, 2) + (asked_FGD @ offset).unsqueeze(-1)
        weights = torch.cat([media_FGS, asked_FGD @ own_FQD.transpose(1, 2)], dim=-1).softmax(dim=-1)
        of_media, of_own = weights.split([centred_FSD.shape[1], own_FQD.shape[1]], dim=-1)
        mean_FGD = (of_media @ centred_FSD) * scale + of_media.sum(dim=-1, keepdim=True) * offset + of_own @ own_FQD
        values_HFQD = mean_FGD.unflatten(1, (self.num_heads, -1)).transpose(0, 1)
        values_HRI = values_HFQD.flatten(1, 2) @ self.to_v.weight.unflatten(0, (self.num_heads, -1)).transpose(1, 2)
        return self.to_out(values_HRI.transpose(0, 1).flatten(1).unflatten(0, latents_FQD.shape[:2]))

    def _per_head(self, rows_FQI: torch.Tensor, weight_ID: torch.Tensor) -> torch.Tensor:
        """Each head's rows times its part of the weight: (F, H Q, D), the heads one behind the other."""
        rows_HRW = rows_FQI.unflatten(-1, (self.num_heads, -1)).flatten(0, 1).transpose(0, 1)
        heads_HRD = rows_HRW @ weight_ID.unflatten(0, (self.num_heads, -1))
        return heads_HRD.unflatten(1, rows_FQI.shape[:2]).transpose(0, 1).flatten(1, 2)


class FrameAttention(nn.Module):
    """Attention between the frames of one latent place, in both directions, without a norm in front."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, latents_BTQD: torch.Tensor) -> torch.Tensor:
        """(B, T, Q, D) -> (B, T, Q, D)."""
        rows = latents_BTQD.transpose(1, 2)
        query, key, value = self.qkv(rows.flatten(0, 1)).chunk(3, dim=-1)
        attended = self.proj(attend(query, key, value, self.num_heads))
        return attended.unflatten(0, rows.shape[:2]).transpose(1, 2)


def feed_forward(dim: int, ratio: int) -> nn.Sequential:
    """Norm, linear, exact GELU, linear; the linears have no bias."""
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, ratio * dim, bias=False), nn.GELU(), nn.Linear(ratio * dim, dim, bias=False)
    )


class VideoFormer(nn.Module):
    """(B, T, N, C) features to (B, T * Q, D) tokens, frame by frame; kind "linear" keeps all T * N tokens."""

    def __init__(self, config: VideoFormerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        if config.kind == "linear":
            self.project = nn.Linear(config.condition_dim, dim)
            return
        self.latents = nn.Parameter(torch.randn(config.num_frames, config.num_latents, dim))
        self.time_pos_emb = nn.Parameter(torch.randn(config.num_frames, 1, dim))
        hidden = EMBEDDING_RATIO * dim
        self.goal_emb = nn.Sequential(nn.Linear(config.condition_dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.layers = nn.ModuleList(nn.ModuleList(self._layer()) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)

    def _layer(self) -> list[nn.Module]:
        config = self.config
        parts: list[nn.Module] = [PerceiverAttention(config.dim, config.num_heads, config.head_dim)]
        if config.kind == "3d":
            parts.append(FrameAttention(config.dim, config.num_heads))
        return [*parts, feed_forward(config.dim, config.mlp_ratio)]

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: VideoFormerConfig | None = None) -> Self:
        """From released weights, with or without `Video_Former.` before their names, or a whole checkpoint of them.

        Without a config sizes are read from the weights, and heads are the release's 8 of 64. `InputError` for misfits.
        """
        weights = former_weights(state_dict)
        model = cls(config or infer_former_config(weights))
        load_weights(model, weights)
        return model

    def forward(
        self, features_BTNC: torch.Tensor, mask: torch.Tensor | None = None, extra: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens of the features.

        `mask` (B, T) bool: False takes a frame's time embedding away and nothing else. `extra` (B, E, D) tokens join
        every frame's features and get its time embedding too. `ConfigError` for features of another shape.
        """
        self._check(features_BTNC, mask, extra)
        if self.config.kind == "linear":
            return self.project(features_BTNC).flatten(1, 2)
        media = self._media(features_BTNC, mask, extra)
        clips, frames = media.shape[:2]
        centred = F.layer_norm(media, media.shape[-1:]).flatten(0, 1)
        latents = self.latents.expand(clips, -1, -1, -1)
        for layer in self.layers:
            latents = latents + layer[0](latents.flatten(0, 1), centred).unflatten(0, (clips, frames))
            if self.config.kind == "3d":
                latents = latents + layer[1](latents)
            latents = latents + layer[-1](latents)
        return self.norm(latents).flatten(1, 2)

    def _media(
        self, features_BTNC: torch.Tensor, mask: torch.Tensor | None, extra: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, T, S, D)."""
        media = self.goal_emb(features_BTNC)
        if extra is not None:
            frames = extra.to(media).unsqueeze(1).expand(-1, media.shape[1], -1, -1)
            media = torch.cat([media, frames], dim=2)
        times = self.time_pos_emb
        if mask is not None:
            times = times * mask.to(times)[:, :, None, None]
        return media + times

    def _check(self, features: torch.Tensor, mask: torch.Tensor | None, extra: torch.Tensor | None) -> None:
        config = self.config
        linear = config.kind == "linear"
        wanted = (features.shape[1] if linear else config.num_frames, config.condition_dim)
        if (features.shape[1], features.shape[-1]) != wanted:
            raise ConfigError(
                f"features {tuple(features.shape)} where the Video-Former takes (B, {config.num_frames}, N, "
                f"{config.condition_dim}).",
                remedy="Set num_frames and condition_dim to the provider's feature_shape.",
            )
        if linear and (mask is not None or extra is not None):
            raise ConfigError("a linear Video-Former has neither time embedding nor extra tokens.")
