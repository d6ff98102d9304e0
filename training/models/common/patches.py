"""Images to patches and back, random masking, per-patch normalisation (RSP 2024, appendix A; MAE 2022).

Shape letters: B batch, C channels, H height, W width, L patches in row-major order, K kept, V values of one patch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from infra.errors import InputError

NORM_EPSILON = 1e-6
ValueOrder = Literal["row_column_channel", "channel_row_column"]


class Masking(NamedTuple):
    """Which patches stay: indices into the L patches, and `mask` (B, L), 1 where a patch was removed."""

    kept_BK: torch.Tensor
    removed_BR: torch.Tensor
    mask_BL: torch.Tensor
    restore_BL: torch.Tensor


def grid_of(images_BCHW: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches; `InputError` when a side is not divisible by the patch."""
    height, width = images_BCHW.shape[-2:]
    if height % patch_size or width % patch_size:
        raise InputError(
            f"image of {height}x{width} pixels is not divisible by patch size {patch_size}.",
            remedy=f"Resize both sides to a multiple of {patch_size}.",
        )
    return height // patch_size, width // patch_size


def patchify(images_BCHW: torch.Tensor, patch_size: int, *, order: ValueOrder = "row_column_channel") -> torch.Tensor:
    """(B, C, H, W) -> (B, L, p*p*C). Targets are ordered row, column, channel; a convolution's weight channel first."""
    rows, columns = grid_of(images_BCHW, patch_size)
    batch, channels = images_BCHW.shape[:2]
    blocks = images_BCHW.reshape(batch, channels, rows, patch_size, columns, patch_size)
    axes = (0, 2, 4, 3, 5, 1) if order == "row_column_channel" else (0, 2, 4, 1, 3, 5)
    return blocks.permute(*axes).reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches_BLV: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """Inverse of `patchify` for row, column, channel order."""
    rows, columns = grid
    batch, _, values = patches_BLV.shape
    channels = values // patch_size**2
    blocks = patches_BLV.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch_size, columns * patch_size)


def patch_statistics(patches_BLV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation over a patch's values, (B, L, 1) each; unbiased variance plus 1e-6, in at least float32."""
    patches_BLV = patches_BLV.to(torch.promote_types(patches_BLV.dtype, torch.float32))
    mean = patches_BLV.mean(dim=-1, keepdim=True)
    return mean, (patches_BLV.var(dim=-1, keepdim=True) + NORM_EPSILON).sqrt()


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Patches that stay visible; truncated like the official code."""
    return int(num_patches * (1 - mask_ratio))


def random_masking(noise_BL: torch.Tensor, mask_ratio: float) -> Masking:
    """Per sample: sort the noise ascending, keep the first `num_kept`."""
    kept = num_kept(noise_BL.shape[1], mask_ratio)
    shuffle = noise_BL.argsort(dim=1)
    mask = torch.ones_like(noise_BL).scatter(1, shuffle[:, :kept], 0.0)
    return Masking(shuffle[:, :kept], shuffle[:, kept:], mask, shuffle.argsort(dim=1))


def take_rows(rows_BLD: torch.Tensor, indices_BK: torch.Tensor) -> torch.Tensor:
    """rows[b, indices[b, k]] -> (B, K, D); a table with batch 1 serves every sample."""
    if rows_BLD.shape[0] == 1:
        # Not rows[0][indices]: that one's gradient is a slow scatter.
        return rows_BLD[0].index_select(0, indices_BK.flatten()).unflatten(0, indices_BK.shape)
    return rows_BLD.gather(1, indices_BK[..., None].expand(-1, -1, rows_BLD.shape[-1]))
