"""Fixed two-dimensional sine/cosine position tables, and their resizing to other grids (MAE 2022, DINO 2021)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

RESIZE_OFFSET = 0.1  # DINO adds it to each side; it shifts the sampling points, so results depend on it


def sincos_table(width: int, grid: tuple[int, int]) -> torch.Tensor:
    """(1, 1 + rows*columns, width) float32; row 0, the class position, is zeros.

    The first half of the channels encodes the column, the second half the row; each half has all sines, then all
    cosines, of frequencies 10000^(-k / (width/4)).
    """
    rows, columns = grid
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)
    halves = [_wave(column, frequencies), _wave(row, frequencies)]
    table = torch.cat([torch.zeros(1, 4 * quarter, dtype=torch.float64), torch.cat(halves, dim=1)])
    return table[None].to(torch.float32)


def _wave(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    angles = positions[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def resize_table(table_1ND: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize from grid `old` to `new` by the factors (new side + 0.1) / old side; the class row is kept."""
    if old == new:
        return table_1ND
    width = table_1ND.shape[-1]
    image = table_1ND[:, 1:].reshape(1, *old, width).permute(0, 3, 1, 2)
    factors = tuple((side + RESIZE_OFFSET) / before for side, before in zip(new, old, strict=True))
    resized = F.interpolate(image, scale_factor=factors, mode="bicubic", align_corners=False)
    patches = resized.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], width)
    return torch.cat([table_1ND[:, :1], patches], dim=1)
