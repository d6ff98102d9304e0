"""The shared image encoder: a plain vision transformer under timm's and DINO's parameter names.

Shape letters: B batch, C channels, H height, W width, N tokens, L patches, K kept patches, D width.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import model_validator
from torch import nn
from torch.nn import functional as F

from infra.config import Config
from training.models.common.attention import Block, initialise_linears, layer_norm
from training.models.common.patches import grid_of, patchify, take_rows
from training.models.common.positions import resize_table, sincos_table

ENCODER_PREFIXES = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
TOKEN_DEVIATION = 0.02


class EncoderConfig(Config):
    """Sizes of the encoder. The default is ViT-S/16 at 224 pixels."""

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6  # not visible in a state dict: another count loads silently and computes nonsense
    mlp_ratio: float = 4.0

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(f"embed_dim {self.embed_dim} must be divisible by 4 and by num_heads {self.num_heads}")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at the training size."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """Patches at the training size."""
        return self.grid[0] * self.grid[1]


class PatchEmbedding(nn.Module):
    """Linear map of each patch, its weight kept as a strided convolution's."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: torch.Tensor, kept_BK: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, H, W) -> (B, L, D), or (B, K, D) for the kept patches only.

        A linear map of patches equals the convolution, is faster on a CPU and can leave out removed patches.
        """
        patches = patchify(images_BCHW, self.patch_size, order="channel_row_column")
        if kept_BK is not None:
            patches = take_rows(patches, kept_BK)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """Class token, fixed sine/cosine positions, pre-norm blocks and a final norm that always applies."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.config = config
        self.patch_embed = PatchEmbedding(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed: torch.Tensor
        self.register_buffer("pos_embed", sincos_table(width, config.grid))
        self.blocks = nn.ModuleList(Block(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = layer_norm(width)
        self.initialise()

    def initialise(self) -> None:
        """Draw fresh weights from torch's global generator; the patch bias keeps the convolution's default."""
        initialise_linears(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=TOKEN_DEVIATION)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Colour-normalised (B, 3, H, W) of any size divisible by the patch -> (B, 1 + L, D) after the final norm."""
        return self.encode_kept(images)

    def encode_kept(
        self, images_BCHW: torch.Tensor, kept_BK: torch.Tensor | None = None, *, class_only: bool = False
    ) -> torch.Tensor:
        """(B, 1 + L or K, D) after the final norm; `class_only` computes just the class row of the last block.

        Positions are added before any removal, so a kept patch knows where it was.
        """
        rows = self._embed(images_BCHW, kept_BK)
        for block in self.blocks[:-1]:
            rows = block(rows)
        return self.norm(self.blocks[-1](rows, 1 if class_only else None))

    def encode_pair(
        self, images_BCHW: torch.Tensor, class_images_BCHW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(`encode_kept(images)`, `encode_kept(class_images, class_only=True)`) of equal batches, in one pass."""
        rows = self._embed(torch.cat([images_BCHW, class_images_BCHW]), None)
        for block in self.blocks[:-1]:
            rows = block(rows)
        tokens, others = rows.split([len(images_BCHW), len(class_images_BCHW)])
        return self.norm(self.blocks[-1](tokens)), self.norm(self.blocks[-1](others, 1))

    def _embed(self, images_BCHW: torch.Tensor, kept_BK: torch.Tensor | None) -> torch.Tensor:
        grid = grid_of(images_BCHW, self.config.patch_size)
        table = resize_table(self.pos_embed, self.config.grid, grid)
        places = table[:, 1:] if kept_BK is None else take_rows(table[:, 1:], kept_BK)
        rows = self.patch_embed(images_BCHW, kept_BK) + places
        class_rows = (self.cls_token + table[:, :1]).expand(rows.shape[0], -1, -1)
        return torch.cat([class_rows, rows], dim=1)
