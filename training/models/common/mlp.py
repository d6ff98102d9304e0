"""The plain perceptron of policy heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class Perceptron(nn.Module):
    """Linear layers with ReLU between them; optionally a batch norm on the input (CortexBench's policy)."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs) if batch_norm else nn.Identity()
        widths = [inputs, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.out = nn.Linear(widths[-1], outputs)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, inputs) -> (B, outputs)."""
        rows = self.norm(rows)
        for layer in self.hidden:
            rows = torch.relu(layer(rows))
        return self.out(rows)
