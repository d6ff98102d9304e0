"""Configuration of a masked autoencoder, "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022).

The default is ViT-S/16, which the official code does not have; its decoder is the official one of every size.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from training.models.common.vit import EncoderConfig


class MAEConfig(EncoderConfig):
    """Encoder sizes (inherited), decoder sizes, masking and target."""

    decoder_embed_dim: int = 512
    decoder_depth: int = Field(default=8, ge=1)
    decoder_num_heads: int = 16
    norm_pix_loss: bool = True  # the official command line's default is off; its pre-training command turns it on
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)

    @model_validator(mode="after")
    def _decoder_fits(self) -> Self:
        if self.decoder_embed_dim % self.decoder_num_heads or self.decoder_embed_dim % 4:
            raise ValueError(f"decoder_embed_dim {self.decoder_embed_dim} must be divisible by 4 and decoder_num_heads")
        kept = int(self.num_patches * (1 - self.mask_ratio))
        if not 0 < kept < self.num_patches:
            raise ValueError(f"mask_ratio {self.mask_ratio} keeps {kept} of {self.num_patches} patches")
        return self

    @property
    def patch_values(self) -> int:
        """Values of one patch, the decoder's output width."""
        return 3 * self.patch_size**2
