"""Transformer parts with timm's parameter names: attention, cross-attention, MLP and the two pre-norm blocks.

Shape letters: B batch, N query tokens, S key/value tokens, D width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

LAYER_NORM_EPSILON = 1e-6


def layer_norm(width: int) -> nn.LayerNorm:
    """The papers' LayerNorm: epsilon 1e-6 everywhere."""
    return nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)


def _split_heads(rows_BND: torch.Tensor, num_heads: int) -> torch.Tensor:
    return rows_BND.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(query_BND: torch.Tensor, key_BSD: torch.Tensor, value_BSD: torch.Tensor, num_heads: int) -> torch.Tensor:
    query, key, value = (_split_heads(rows, num_heads) for rows in (query_BND, key_BSD, value_BSD))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention with one fused `qkv` linear (order q, k, v) with bias; scale = head width ** -0.5."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, rows_BND: torch.Tensor, num_queries: int | None = None) -> torch.Tensor:
        """(B, N, D) -> (B, N, D); with `num_queries`, only those first rows are asked for and returned."""
        if num_queries is None:
            query, key, value = self.qkv(rows_BND).chunk(3, dim=-1)
        else:
            width = rows_BND.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            query = F.linear(rows_BND[:, :num_queries], weight[:width], bias[:width])
            key, value = F.linear(rows_BND, weight[width:], bias[width:]).chunk(2, dim=-1)
        return self.proj(_attend(query, key, value, self.num_heads))


class CrossAttention(nn.Module):
    """Separate `q` and fused `kv` (k, then v) linears with bias; several memories are projected in one product."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, query_BND: torch.Tensor, memory_BSD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Attend to each of the memories that `memory` holds side by side -> (memories * B, N, D), memory by memory.

        `query` has batch 1 (shared by all), or memories * B.
        """
        batch = memory_BSD.shape[0]
        query = self.q(query_BND)
        if query.shape[0] == 1:
            query = query.expand(batch * len(lengths), -1, -1)
        key_value = self.kv(memory_BSD).split(tuple(lengths), dim=1)
        attended = []
        for part, pair in zip(query.split(batch), key_value, strict=True):
            key, value = pair.chunk(2, dim=-1)
            attended.append(_attend(part, key, value, self.num_heads))
        return self.proj(torch.cat(attended))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(rows)))


class Block(nn.Module):
    """Pre-norm encoder block: x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, rows_BND: torch.Tensor, num_queries: int | None = None) -> torch.Tensor:
        """(B, N, D) -> (B, N, D), or only its first `num_queries` rows: exact, and cheap in a last block."""
        residual = rows_BND if num_queries is None else rows_BND[:, :num_queries]
        rows = residual + self.attn(self.norm1(rows_BND), num_queries)
        return rows + self.mlp(self.norm2(rows))


class CrossBlock(nn.Module):
    """Pre-norm decoder block in the order cross-attention, self-attention, MLP; own norm for keys and values.

    The numbering of the parameters (norm1, norm_kv1, norm3, norm4, mlp2) is the official one.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.norm_kv1 = layer_norm(width)
        self.cattn = CrossAttention(width, num_heads)
        self.norm3 = layer_norm(width)
        self.attn = Attention(width, num_heads)
        self.norm4 = layer_norm(width)
        self.mlp2 = Mlp(width, int(width * mlp_ratio))

    def forward(self, rows_BND: torch.Tensor, memory_BSD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Queries (1 or memories * B, N, D), memories side by side (B, sum of lengths, D) -> (memories * B, N, D)."""
        rows = rows_BND + self.cattn(self.norm1(rows_BND), self.norm_kv1(memory_BSD), lengths)
        rows = rows + self.attn(self.norm3(rows))
        return rows + self.mlp2(self.norm4(rows))


def initialise_linears(module: nn.Module) -> None:
    """Every Linear below `module`: Xavier-uniform weight (a fused matrix counts as one), zero bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
