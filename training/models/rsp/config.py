"""Configuration of RSP, "Visual Representation Learning with Stochastic Frame Prediction" (ICML 2024).

The default is the paper's ViT-S/16. Every ablation of tables 3, 4 and 6 is a field.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from training.models.common.vit import EncoderConfig


class RSPConfig(EncoderConfig):
    """Encoder sizes (inherited), decoder sizes, latent, loss weights, ablation switches."""

    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    num_latents: int = 32  # categorical variables, or dimensions of the Gaussian
    num_classes: int = 32  # classes of each categorical variable
    norm_pix_loss: bool = True  # the official command line's default is off; paper and README turn it on
    kl_scale: float = Field(default=0.01, ge=0)
    # weight of the side that trains the prior (the official flag is 1 - this)
    kl_balance: float = Field(default=0.8, ge=0, le=1)
    free_bits: float = Field(default=0.1, ge=0)  # nats, on the batch mean of the summed KL
    mask_ratio: float = Field(default=0.75, ge=0, lt=1)
    # deviation in colour-normalised space, encoder input of the future frame only
    noise_scale: float = Field(default=0.5, ge=0)

    latent: Literal["categorical", "gaussian", "none"] = "categorical"  # table 3b; "none" is 3a, deterministic
    masked_autoencoding: bool = True  # table 3c
    separate_decoder: bool = False  # table 3c: a second mask token, blocks, norm and head for masked autoencoding
    shared_projection: bool = False  # table 6a: one projection of source and of visible tokens
    latent_fusion: Literal["token", "channels"] = "token"  # table 6b
    target_corruption: Literal["noise", "mask"] = "noise"  # table 4b: remove target patches instead of adding noise
    target_mask_ratio: float = Field(default=0.75, ge=0, lt=1)  # share removed when target_corruption is "mask"

    @model_validator(mode="after")
    def _switches_fit(self) -> Self:
        if self.decoder_embed_dim % self.decoder_num_heads or self.decoder_embed_dim % 4:
            raise ValueError(f"decoder_embed_dim {self.decoder_embed_dim} must be divisible by 4 and decoder_num_heads")
        if not self.masked_autoencoding and (self.separate_decoder or self.shared_projection):
            raise ValueError("separate_decoder and shared_projection need masked_autoencoding")
        if self.shared_projection and self.has_latent and self.latent_fusion == "channels":
            raise ValueError("shared_projection cannot be combined with latent_fusion 'channels': other input widths")
        return self

    @property
    def has_latent(self) -> bool:
        """Whether there are posterior, prior and KL at all."""
        return self.latent != "none"

    @property
    def logits_dim(self) -> int:
        """Outputs of the posterior and prior networks."""
        return self.num_latents * (self.num_classes if self.latent == "categorical" else 2)

    @property
    def latent_dim(self) -> int:
        """Width of the flattened sample."""
        return self.num_latents * (self.num_classes if self.latent == "categorical" else 1)

    @property
    def patch_values(self) -> int:
        """Values of one patch, the decoder's output width."""
        return 3 * self.patch_size**2
