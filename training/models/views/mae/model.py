"""MAE: an image encoder pre-trained by filling in the patches it was not shown (He et al. 2022, section 3).

Shape letters: B batch, H height, W width, N = 1 + L tokens, L patches, K kept patches, R removed ones, D width,
V values of one patch. Parameters carry the official names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from infra.errors import InputError
from training.models.common.attention import Block, initialise_linears, layer_norm
from training.models.common.images import to_pixels
from training.models.common.patches import (
    Masking,
    patch_statistics,
    patchify,
    random_masking,
    take_rows,
    unpatchify,
)
from training.models.common.positions import sincos_table
from training.models.common.vit import TOKEN_DEVIATION, VisionTransformer
from training.models.common.weights import load_weights
from training.models.views.mae.config import MAEConfig
from training.models.views.mae.official import DECODER_PREFIXES, fit_tables, has_decoder, official_weights


class MAEOutput(NamedTuple):
    """Scalars of one forward pass."""

    loss: torch.Tensor  # mean squared error over the values of removed patches

    def metrics(self) -> dict[str, float]:
        """The same as plain numbers, for a log."""
        return {"loss": float(self.loss.detach())}


class MAE(VisionTransformer):
    """A vision transformer with a small plain transformer as decoder on top."""

    config: MAEConfig

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        width, heads = config.decoder_embed_dim, config.decoder_num_heads
        self.decoder_embed = nn.Linear(config.embed_dim, width)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, width), std=TOKEN_DEVIATION))
        self.decoder_pos_embed: torch.Tensor
        self.register_buffer("decoder_pos_embed", sincos_table(width, config.grid))
        self.decoder_blocks = nn.ModuleList(Block(width, heads, config.mlp_ratio) for _ in range(config.decoder_depth))
        self.decoder_norm = layer_norm(width)
        self.decoder_pred = nn.Linear(width, config.patch_values)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            initialise_linears(part)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: MAEConfig) -> Self:
        """A model with the weights of an official MAE or VC-1 checkpoint, in their precision.

        A checkpoint of the encoder alone leaves the decoder as drawn; tables of another grid are resized. `InputError`
        names what is missing, unknown or of another shape. The number of heads is in no shape: it comes from the
        config alone (12 for ViT-B, 16 for ViT-L).
        """
        model = cls(config)
        weights = fill_decoder(official_weights(state_dict), model)
        load_weights(model, weights)
        return model.to(weights["cls_token"].dtype)

    def encode(self, images: torch.Tensor, mask_noise: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 1 + kept, D) after the final norm; `mask_noise` (B, L) removes `mask_ratio` of them."""
        if mask_noise is None:
            return self.encode_kept(images)
        return self.encode_kept(images, random_masking(mask_noise, self.config.mask_ratio).kept_BK)

    def forward(
        self,
        images: torch.Tensor,
        *,
        mask_noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEOutput:
        """Loss of colour-normalised pictures (B, 3, S, S) at the training size.

        `mask_noise` (B, L), whose argsort is the shuffle, comes from `generator` (default: torch's global one) if it
        is not given.
        """
        masking = self._masking(images, mask_noise, generator)
        predicted_BRV = self._predict_removed(images, masking)
        targets_BRV = take_rows(self._targets(images), masking.removed_BR)
        return MAEOutput((predicted_BRV - targets_BRV).square().mean())

    @torch.no_grad()
    def reconstruct(
        self,
        images: torch.Tensor,
        *,
        mask_noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Pictures as RGB in [0, 1], (B, 3, S, S), removed patches as predicted: for people to look at.

        With `norm_pix_loss`, mean and contrast of a predicted patch are those of the true one.
        """
        masking = self._masking(images, mask_noise, generator)
        predicted_BRV = self._predict_removed(images, masking)
        patches_BLV = patchify(images, self.config.patch_size).to(predicted_BRV.dtype)
        if self.config.norm_pix_loss:
            mean, deviation = (take_rows(part, masking.removed_BR) for part in patch_statistics(patches_BLV))
            predicted_BRV = predicted_BRV * deviation + mean
        index = masking.removed_BR[..., None].expand_as(predicted_BRV)
        filled = patches_BLV.scatter(1, index, predicted_BRV)
        return to_pixels(unpatchify(filled, self.config.patch_size, self.config.grid))

    def _masking(self, images: torch.Tensor, noise: torch.Tensor | None, generator: torch.Generator | None) -> Masking:
        side = self.config.image_size
        if tuple(images.shape[1:]) != (3, side, side):
            raise InputError(
                f"images {tuple(images.shape)} are no batch of 3x{side}x{side}.", remedy="Resize to image_size."
            )
        if noise is None:
            noise = torch.rand(len(images), self.config.num_patches, generator=generator, device=images.device)
        return random_masking(noise, self.config.mask_ratio)

    def _predict_removed(self, images: torch.Tensor, masking: Masking) -> torch.Tensor:
        """(B, R, V) predictions of the removed patches, in at least float32.

        Attention ignores the order of rows and every row has its position already, so nothing is put back into image
        order, and the last block answers for the removed patches alone.
        """
        visible_BND = self.decoder_embed(self.encode_kept(images, masking.kept_BK))
        class_place, places = self.decoder_pos_embed.split([1, self.config.num_patches], dim=1)
        class_places = class_place.expand(len(visible_BND), -1, -1)
        visible_places = torch.cat([class_places, take_rows(places, masking.kept_BK)], dim=1)
        hidden_BRD = take_rows(self.mask_token + places, masking.removed_BR)
        rows = torch.cat([hidden_BRD, visible_BND + visible_places], dim=1)
        for block in self.decoder_blocks[:-1]:
            rows = block(rows)
        rows = self.decoder_blocks[-1](rows, hidden_BRD.shape[1])
        predicted = self.decoder_pred(self.decoder_norm(rows))
        return predicted.to(torch.promote_types(predicted.dtype, torch.float32))

    def _targets(self, images: torch.Tensor) -> torch.Tensor:
        patches = patchify(images, self.config.patch_size)
        if not self.config.norm_pix_loss:
            return patches
        mean, deviation = patch_statistics(patches)
        return (patches - mean) / deviation


def fill_decoder(weights: Mapping[str, torch.Tensor], model: MAE) -> dict[str, torch.Tensor]:
    """`weights` at the model's grid and, where they are an encoder's alone, with the decoder the model has drawn."""
    fitted = fit_tables(weights, model.config.grid)
    if has_decoder(fitted):
        return fitted
    drawn = {name: value for name, value in model.state_dict().items() if name.startswith(DECODER_PREFIXES)}
    return drawn | fitted
