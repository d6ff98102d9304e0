"""From a text encoder's states to what the UNet attends to. Shape letters: B sentences, L tokens, D width."""

from __future__ import annotations

import torch

BASE = 10_000.0


def position_table(length: int, width: int) -> torch.Tensor:
    """(L, D) float32: the sines of all frequencies, then their cosines; positions 0, 1, ..."""
    half = width // 2
    frequencies = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.float32)


def encode_text(last_hidden_state: torch.Tensor, *, position_code: bool) -> torch.Tensor:
    """States (B, L, D) -> tokens (B, L, 2 D): the position code added, then the features written twice.

    Twice, because the UNet's cross-attention is twice as wide as the text encoder and gets no new weights.
    """
    states = last_hidden_state
    if position_code:
        states = states + position_table(states.shape[-2], states.shape[-1]).to(states)
    return torch.cat([states, states], dim=-1)
