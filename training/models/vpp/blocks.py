"""Transformer parts of the policy under the release's parameter names.

Shape letters: B batch, N query tokens, S key/value tokens, D width, H heads, W width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

INIT_DEVIATION = 0.02


def split_heads(rows_BND: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, N, H W) -> (B, H, N, W)."""
    return rows_BND.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    query_BND: torch.Tensor,
    key_BSD: torch.Tensor,
    value_BSD: torch.Tensor,
    num_heads: int,
    *,
    mask_NS: torch.Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Scaled dot-product attention -> (B, N, H W); `mask` True where a query may look, `causal` needs N = S."""
    query, key, value = (split_heads(rows, num_heads) for rows in (query_BND, key_BSD, value_BSD))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_NS, is_causal=causal, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


class ScaleNorm(nn.Module):
    """Layer norm without bias: the release's `LayerNorm(bias=False)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(
        self, rows: torch.Tensor, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalised rows; with `shift` and `scale`, `shift + rows * scale` (the scale is not 1 + scale).

        One shift and scale (D,) for all rows become the norm's own weights: one pass over memory.
        """
        shape = self.weight.shape
        if shift is None or scale is None:
            return F.layer_norm(rows, shape, self.weight)
        if shift.ndim == 1:
            return F.layer_norm(rows, shape, self.weight * scale, shift)
        return shift + F.layer_norm(rows, shape, self.weight) * scale


class Dropouts(NamedTuple):
    """Rates of one block, in training mode."""

    attention: float
    residual: float
    mlp: float


class BlockAttention(nn.Module):
    """Self- or cross-attention: separate key, query, value with bias, output without."""

    def __init__(self, width: int, num_heads: int, dropouts: Dropouts) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropouts = dropouts
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, width, bias=False)

    def keys_values(self, rows_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries look at: computed once where several passes share it."""
        return self.key(rows_BSD), self.value(rows_BSD)

    def forward(
        self,
        rows_BND: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        *,
        mask_NS: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        dropout = self.dropouts.attention if self.training else 0.0
        attended = attend(
            self.query(rows_BND), *keys_values, self.num_heads, mask_NS=mask_NS, causal=causal, dropout=dropout
        )
        return F.dropout(self.c_proj(attended), self.dropouts.residual, self.training)


class BlockMLP(nn.Module):
    """Linear, exact GELU, linear, four times as wide inside, without bias."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return F.dropout(self.c_proj(F.gelu(self.c_fc(rows))), self.dropout, self.training)


class EncoderBlock(nn.Module):
    """Pre-norm block over the context."""

    def __init__(self, width: int, num_heads: int, dropouts: Dropouts) -> None:
        super().__init__()
        self.ln_1 = ScaleNorm(width)
        self.attn = BlockAttention(width, num_heads, dropouts)
        self.ln_2 = ScaleNorm(width)
        self.mlp = BlockMLP(width, dropouts.mlp)

    def forward(self, rows_BND: torch.Tensor, first: int | None = None) -> torch.Tensor:
        """(B, N, D) -> (B, N, D), or only its `first` rows: exact, and cheap in a last block."""
        normed = self.ln_1(rows_BND)
        rows = rows_BND[:, :first] + self.attn(normed[:, :first], self.attn.keys_values(normed))
        return rows + self.mlp(self.ln_2(rows))


class Modulation(NamedTuple):
    """What a noise level does to a block: each (D,) for all clips, or (B, 1, D)."""

    attention_shift: torch.Tensor
    attention_scale: torch.Tensor
    attention_gate: torch.Tensor
    mlp_shift: torch.Tensor
    mlp_scale: torch.Tensor
    mlp_gate: torch.Tensor


class AdaLN(nn.Module):
    """The linear map from a noise embedding to a block's six modulations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class DecoderBlock(nn.Module):
    """Gated causal self-attention, ungated cross-attention, gated MLP."""

    def __init__(self, width: int, num_heads: int, dropouts: Dropouts) -> None:
        super().__init__()
        self.ln_1 = ScaleNorm(width)
        self.attn = BlockAttention(width, num_heads, dropouts)
        self.cross_att = BlockAttention(width, num_heads, dropouts)
        self.ln3 = nn.LayerNorm(width)
        self.ln_2 = ScaleNorm(width)
        self.mlp = BlockMLP(width, dropouts.mlp)
        self.adaLN_zero = AdaLN(width)

    def forward(
        self,
        rows_BND: torch.Tensor,
        modulation: Modulation,
        context: tuple[torch.Tensor, torch.Tensor],
        *,
        mask_NS: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """(B, N, D) -> (B, N, D); `context` are keys and values, `mask` and `causal` of the cross-attention."""
        normed = self.ln_1(rows_BND, modulation.attention_shift, modulation.attention_scale)
        attended = self.attn(normed, self.attn.keys_values(normed), causal=True)
        rows = torch.addcmul(rows_BND, modulation.attention_gate, attended)
        rows = rows + self.cross_att(self.ln3(rows), context, mask_NS=mask_NS, causal=causal)
        normed = self.ln_2(rows, modulation.mlp_shift, modulation.mlp_scale)
        return torch.addcmul(rows, modulation.mlp_gate, self.mlp(normed))


def init_transformer(module: nn.Module) -> None:
    """The release's start: linear weights N(0, 0.02), biases 0, norms 1 and 0; the modulation as well."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_DEVIATION)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
