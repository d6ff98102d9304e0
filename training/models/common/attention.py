"""Transformer parts with timm's parameter names: attention, cross-attention, MLP and the two pre-norm blocks.

Shape letters: B batch, M memories, N query tokens, S key/value tokens, L fill rows, R picked ones, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from training.models.common.patches import take_rows

LAYER_NORM_EPSILON = 1e-6


def layer_norm(width: int) -> nn.LayerNorm:
    """The papers' LayerNorm: epsilon 1e-6 everywhere."""
    return nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)


def _split_heads(rows_BND: torch.Tensor, num_heads: int) -> torch.Tensor:
    return rows_BND.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _attend(query_BND: torch.Tensor, key_BSD: torch.Tensor, value_BSD: torch.Tensor, num_heads: int) -> torch.Tensor:
    query, key, value = (_split_heads(rows, num_heads) for rows in (query_BND, key_BSD, value_BSD))
    if _prefers_products(query):
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        attended = scores.softmax(dim=-1).to(value.dtype) @ value
    else:
        attended = F.scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).flatten(2)


def _prefers_products(query: torch.Tensor) -> bool:
    """Whether two batched products beat the fused kernel: on a CPU in bfloat16 or with oneDNN products, 3 to 6 times.

    The fused CPU kernel calls the matmul library on small tiles; only the default float32 library is quick at that.
    """
    if query.device.type != "cpu":
        return False
    return query.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest"


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


class Memory(NamedTuple):
    """What a cross-attention reads: `rows` (B, S, D), and for each sample `picks` (B, R) out of `fill` (1, L, D).

    Fill rows are equal for all samples, so their keys and values are computed once per batch.
    """

    rows_BSD: torch.Tensor
    fill_1LD: torch.Tensor | None = None
    picks_BR: torch.Tensor | None = None


class CrossAttention(nn.Module):
    """Separate `q` and fused `kv` (k, then v) linears with bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, query_BND: torch.Tensor, keys_values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Attend to each of M projected memories (B, S, 2 D) -> (M * B, N, D), memory by memory.

        `query` has batch 1 (shared by all), or M * B.
        """
        batch = keys_values[0].shape[0]
        query = self.q(query_BND)
        if query.shape[0] == 1:
            query = query.expand(batch * len(keys_values), -1, -1)
        attended = []
        for part, key_value in zip(query.split(batch), keys_values, strict=True):
            key, value = key_value.chunk(2, dim=-1)
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

    def forward(self, rows_BND: torch.Tensor, memories: Sequence[Memory]) -> torch.Tensor:
        """Queries (1 or M * B, N, D) and M memories -> (M * B, N, D), memory by memory."""
        rows = rows_BND + self.cattn(self.norm1(rows_BND), self._keys_values(memories))
        rows = rows + self.attn(self.norm3(rows))
        return rows + self.mlp2(self.norm4(rows))

    def _keys_values(self, memories: Sequence[Memory]) -> list[torch.Tensor]:
        """(B, S, 2 D) of each memory; one product for all their rows."""
        lengths = [memory.rows_BSD.shape[1] for memory in memories]
        joined = self._project(torch.cat([memory.rows_BSD for memory in memories], dim=1)).split(lengths, dim=1)
        projected = []
        for part, memory in zip(joined, memories, strict=True):
            if memory.fill_1LD is None or memory.picks_BR is None:
                projected.append(part)
            else:
                projected.append(torch.cat([part, take_rows(self._project(memory.fill_1LD), memory.picks_BR)], dim=1))
        return projected

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        return self.cattn.kv(self.norm_kv1(rows))


def initialise_linears(module: nn.Module) -> None:
    """Every Linear below `module`: Xavier-uniform weight (a fused matrix counts as one), zero bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
