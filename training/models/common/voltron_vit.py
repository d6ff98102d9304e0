"""Voltron's image encoder (Karamcheti et al., RSS 2023): a vision transformer that reads a sentence's token states.

Written from the public facts of the official package (`siddk/voltron-robotics`), whose parameter names it carries.
Against a plain vision transformer: RMS norms without bias, a gated MLP (SiLU), a learnt scale on every branch, and
one sequence of image and language tokens.

The official attention applies its mask to the rows that ask, not to those that are asked: image tokens attend to the
states of padding too, and a padding token takes the plain mean of all values. The released weights were trained that
way, so it is done that way here.

Shape letters: B batch, F frames (1, or V-Gen's 2), L patches, S language tokens, N all rows, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from infra.config import Config
from training.models.common.patches import grid_of
from training.models.common.positions import resize_table
from training.models.common.vit import PatchEmbedding

RMS_FLOOR = 1e-8
MAX_TOKENS = 20  # of a sentence, padded to that many


class VoltronConfig(Config):
    """Sizes of an encoder; all but the number of heads are in the shapes of its weights."""

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    language_dim: int
    num_frames: int = 1  # 2: V-Gen, which looks at a first and a later frame
    class_token: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at the training size."""
        return self.image_size // self.patch_size, self.image_size // self.patch_size


class RMSNorm(nn.Module):
    """x / max(norm(x) / sqrt(D), 1e-8) * g."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        deviation = rows.norm(dim=-1, keepdim=True) * rows.shape[-1] ** -0.5
        return rows / deviation.clamp(min=RMS_FLOOR) * self.g


class GatedLinear(nn.Module):
    """One linear map to two halves: the first times SiLU of the second."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 2 * hidden)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., hidden)."""
        value, gate = self.project(rows).chunk(2, dim=-1)
        return value * F.silu(gate)


class BranchScale(nn.Module):
    """A factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return rows * self.gamma


class MaskedAttention(nn.Module):
    """Self-attention over all rows; rows outside `asks` take the mean of the values (see above)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, rows_BND: torch.Tensor, asks_BN: torch.Tensor) -> torch.Tensor:
        """(B, N, D), (B, N) bool -> (B, N, D)."""
        query, key, value = self.qkv(rows_BND).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.proj(torch.where(asks_BN[..., None], attended, value.mean(dim=1, keepdim=True)))


class VoltronBlock(nn.Module):
    """Pre-norm block whose two branches are scaled."""

    def __init__(self, config: VoltronConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.pre_norm_attn = RMSNorm(width)
        self.attn = MaskedAttention(width, config.num_heads)
        self.layer_scale_attn = BranchScale(width)
        self.pre_norm_mlp = RMSNorm(width)
        # The middle place is the official dropout's.
        self.mlp = nn.Sequential(GatedLinear(width, config.mlp_dim), nn.Identity(), nn.Linear(config.mlp_dim, width))
        self.layer_scale_mlp = BranchScale(width)

    def forward(self, rows_BND: torch.Tensor, asks_BN: torch.Tensor) -> torch.Tensor:
        """(B, N, D), (B, N) bool -> (B, N, D)."""
        rows = rows_BND + self.layer_scale_attn(self.attn(self.pre_norm_attn(rows_BND), asks_BN))
        return rows + self.layer_scale_mlp(self.mlp(self.pre_norm_mlp(rows)))


class VoltronViT(nn.Module):
    """The encoder without the language model. V-Gen is shown the picture as both of its frames."""

    def __init__(self, config: VoltronConfig) -> None:
        super().__init__()
        width, rows = config.embed_dim, config.grid[0] * config.grid[1] + config.class_token
        self.config = config
        self.patch2embed = PatchEmbedding(config.patch_size, width)
        self.encoder_pe = nn.Parameter(torch.zeros(1, rows, width))
        self.encoder_blocks = nn.ModuleList(VoltronBlock(config) for _ in range(config.depth))
        self.encoder_norm = RMSNorm(width)
        self.lang2encoder = nn.Linear(config.language_dim, width)
        self.img_token = nn.Parameter(torch.zeros(1, 1, width))
        self.lang_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.num_frames > 1:
            self.ctx_enc_pe = nn.Parameter(torch.zeros(1, config.num_frames, 1, width))

    def forward(self, images_BCHW: torch.Tensor, states_BSD: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        """Colour-normalised (B, 3, H, W), language states and their mask -> (B, (1 +) L, D) after the final norm.

        The rows are the picture's: a class token where the weights have one, then the patches (of the later frame).
        """
        pictures = self._pictures(images_BCHW)
        words = self.lang2encoder(states_BSD) + self.lang_token
        rows = torch.cat([pictures, words], dim=1)
        asks = torch.cat([mask_BS.new_ones(pictures.shape[:2]), mask_BS], dim=1).bool()
        for block in self.encoder_blocks:
            rows = block(rows, asks)
        first = pictures.shape[1] // self.config.num_frames * (self.config.num_frames - 1)
        return self.encoder_norm(rows[:, first : pictures.shape[1]])

    def _pictures(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, F * L (+ 1), D): embedded patches with positions and the picture's mark."""
        rows = self.patch2embed(images_BCHW)
        if self.config.class_token:
            rows = torch.cat([self.cls_token.expand(len(rows), -1, -1), rows], dim=1)
        rows = rows + self._positions(grid_of(images_BCHW, self.config.patch_size))
        if self.config.num_frames > 1:
            rows = (rows[:, None] + self.ctx_enc_pe).flatten(1, 2)
        return rows + self.img_token

    def _positions(self, grid: tuple[int, int]) -> torch.Tensor:
        table = self.encoder_pe
        if self.config.class_token:
            return resize_table(table, self.config.grid, grid)
        return resize_table(F.pad(table, (0, 0, 1, 0)), self.config.grid, grid)[:, 1:]
