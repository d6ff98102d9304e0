"""RSP: an image encoder pre-trained by predicting a future frame from a stochastic latent, and masked patches.

Sources: RSP (ICML 2024) sections 3 and 4 and the official code, which wins where they differ; see README.md.
Shape letters: B batch, C channels, H height, W width, N = 1 + L tokens, L patches, R removed patches, D width,
V values of one patch, Z latent width. Parameters carry the official names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from infra.errors import InputError
from training.models.common.attention import CrossBlock, Memory, initialise_linears, layer_norm
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
from training.models.rsp.config import RSPConfig
from training.models.rsp.latent import balanced_kl, clip_kl, draw_sample, full_precision, reparameterise
from training.models.rsp.official import official_weights


class RSPDraws(NamedTuple):
    """Every random number of a forward pass, each optional; what is None is drawn, in this order."""

    future_noise: torch.Tensor | None = None  # (B, 3, H, W) unit normal; target masking: (B, L) uniform
    posterior_sample: torch.Tensor | None = None  # (B, V, K) one-hot or (B, V) uniform; Gaussian: (B, V) unit normal
    prior_sample: torch.Tensor | None = None  # likewise
    mask_noise: torch.Tensor | None = None  # (B, L) whose argsort is the shuffle


class RSPOutput(NamedTuple):
    """Scalars of one forward pass. A term that an ablation switches off is zero."""

    loss: torch.Tensor  # loss_future + kl_scale * loss_kl + loss_masked
    loss_future: torch.Tensor
    loss_kl: torch.Tensor  # after free bits
    kl: torch.Tensor  # before free bits, nats
    loss_masked: torch.Tensor
    loss_prior: torch.Tensor | None  # future loss from a prior sample, without gradient; None unless prior_pass

    def metrics(self) -> dict[str, float]:
        """The same as plain numbers, for a log."""
        return {name: float(value.detach()) for name, value in self._asdict().items() if value is not None}


class DecoderParts(NamedTuple):
    """What decodes: shared by both objectives unless `separate_decoder`."""

    mask_token: nn.Parameter
    blocks: nn.ModuleList
    norm: nn.LayerNorm
    head: nn.Linear


class Latents(NamedTuple):
    """Samples as (B, Z) and the per-sample divergence."""

    posterior_BZ: torch.Tensor | None
    prior_BZ: torch.Tensor | None
    kl_B: torch.Tensor | None


class RSP(VisionTransformer):
    """A vision transformer with a latent and a cross-attending decoder on top."""

    config: RSPConfig

    def __init__(self, config: RSPConfig) -> None:
        super().__init__(config)
        width, inner = config.embed_dim, config.decoder_embed_dim
        if config.has_latent:
            self.to_posterior = _perceptron(2 * width, 2 * width, config.logits_dim)
            self.to_prior = _perceptron(width, 2 * width, config.logits_dim)
        joined = config.has_latent and config.latent_fusion == "channels"
        if config.has_latent and not joined:
            self.decoder_embed_stoch = nn.Linear(config.latent_dim, inner)
        self.decoder_embed_deter = nn.Linear(width + (config.latent_dim if joined else 0), inner)
        if config.masked_autoencoding and not config.shared_projection:
            self.decoder_embed_mae = nn.Linear(width, inner)
        self.decoder_pos_embed: torch.Tensor
        self.register_buffer("decoder_pos_embed", sincos_table(inner, config.grid))
        self._add_decoder("")
        if config.separate_decoder:
            self._add_decoder("masked_")
        for name, part in self.named_children():
            if name not in ("patch_embed", "blocks", "norm"):
                initialise_linears(part)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: RSPConfig) -> Self:
        """A model with the official release's weights (a checkpoint or its `model` entry), in their precision.

        `InputError` names what is missing, unknown or of another shape. The number of heads is not checked by
        shapes: it comes from the config alone.
        """
        weights = official_weights(state_dict)
        model = cls(config)
        load_weights(model, weights)
        return model.to(weights["cls_token"].dtype)

    def encode(self, images: torch.Tensor, mask_noise: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 1 + kept, D) after the final norm; `mask_noise` (B, L) removes `mask_ratio` of them."""
        if mask_noise is None:
            return self.encode_kept(images)
        return self.encode_kept(images, random_masking(mask_noise, self.config.mask_ratio).kept_BK)

    def forward(
        self,
        current: torch.Tensor,
        future: torch.Tensor,
        draws: RSPDraws | None = None,
        *,
        prior_pass: bool = False,
        generator: torch.Generator | None = None,
    ) -> RSPOutput:
        """Losses of frame pairs, two colour-normalised (B, 3, S, S) at the training size.

        Draws that are not given come from `generator` (default: torch's global one), always the same number of
        them: asking for the prior pass does not shift the stream.
        """
        self._check_images(current, future)
        draws = draws or RSPDraws()
        source_BND, latents = self._source_and_latents(current, future, draws, generator)
        targets_BLV = self._targets(future)

        memory = self.future_memory(source_BND, latents.posterior_BZ)
        masking = self._masking(future, draws, generator)
        if masking is None:
            (rows,) = self.decode([memory])
            loss_masked = targets_BLV.new_zeros(())
        else:
            rows, masked_rows = self._decode_both(memory, self.masked_memory(future, masking))
            removed = self._predict(take_rows(masked_rows[:, 1:], masking.removed_BR), masked=True)
            loss_masked = (removed - take_rows(targets_BLV, masking.removed_BR)).square().mean()
        loss_future = (self._predict(rows[:, 1:]) - targets_BLV).square().mean()

        kl, loss_kl = self._kl(latents, loss_future)
        loss = loss_future + self.config.kl_scale * loss_kl + loss_masked
        loss_prior = self._prior_loss(source_BND, latents, targets_BLV) if prior_pass else None
        return RSPOutput(loss, loss_future, loss_kl, kl, loss_masked, loss_prior)

    def posterior_logits(self, source_class_BD: torch.Tensor, target_class_BD: torch.Tensor) -> torch.Tensor:
        """(B, logits) in at least float32, from the two class tokens."""
        return full_precision(self.to_posterior(torch.cat([source_class_BD, target_class_BD], dim=-1)))

    def prior_logits(self, source_class_BD: torch.Tensor) -> torch.Tensor:
        """(B, logits) in at least float32, from the current frame's class token alone."""
        return full_precision(self.to_prior(source_class_BD))

    def future_memory(self, source_BND: torch.Tensor, latent_BZ: torch.Tensor | None) -> Memory:
        """Keys and values of future prediction: [latent token, no position; projected source tokens + positions]."""
        if latent_BZ is None:
            return Memory(self.decoder_embed_deter(source_BND) + self.decoder_pos_embed)
        latent_BZ = latent_BZ.to(source_BND.dtype)
        if self.config.latent_fusion == "channels":
            repeated = latent_BZ[:, None].expand(-1, source_BND.shape[1], -1)
            return Memory(self.decoder_embed_deter(torch.cat([source_BND, repeated], dim=-1)) + self.decoder_pos_embed)
        token = self.decoder_embed_stoch(latent_BZ)[:, None]
        return Memory(torch.cat([token, self.decoder_embed_deter(source_BND) + self.decoder_pos_embed], dim=1))

    def masked_memory(self, images_BCHW: torch.Tensor, masking: Masking) -> Memory:
        """Keys and values of masked autoencoding: class and visible tokens, and mask tokens where patches were removed.

        Not put back into image order: each row has its position already, and attention ignores the order of keys.
        """
        visible = self.encode_kept(images_BCHW, masking.kept_BK)
        project = self.decoder_embed_deter if self.config.shared_projection else self.decoder_embed_mae
        class_place, places = self.decoder_pos_embed.split([1, self.config.num_patches], dim=1)
        visible_places = torch.cat(
            [class_place.expand(len(visible), -1, -1), take_rows(places, masking.kept_BK)], dim=1
        )
        fill = self._parts(masked=True).mask_token + places
        return Memory(project(visible) + visible_places, fill, masking.removed_BR)

    def decode(self, memories: list[Memory], *, masked: bool = False) -> list[torch.Tensor]:
        """For each memory the decoded rows (B, 1 + L, D), class position first, before the decoder's norm.

        The queries are mask tokens everywhere, so both objectives go through the blocks as one batch.
        """
        parts = self._parts(masked=masked)
        rows = parts.mask_token + self.decoder_pos_embed
        for block in parts.blocks:
            rows = block(rows, memories)
        return list(rows.chunk(len(memories)))

    def predict_patches(self, memory: Memory, *, masked: bool = False) -> torch.Tensor:
        """(B, L, V) predicted patches, in the space of the targets."""
        (rows,) = self.decode([memory], masked=masked)
        return self._predict(rows[:, 1:], masked=masked)

    @torch.no_grad()
    def predict_future(
        self,
        current: torch.Tensor,
        future: torch.Tensor | None = None,
        draws: RSPDraws | None = None,
        *,
        use_posterior: bool = False,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Predicted future frames as RGB in [0, 1], (B, 3, S, S), from a prior (or posterior) sample: for pictures.

        The model predicts normalised patches. Their mean and deviation are taken from `future` when given, else from
        the current frame: contrast and mean colour of each patch are then *not* predictions.
        """
        draws = draws or RSPDraws()
        latent_BZ = None
        if use_posterior:
            if future is None:
                raise InputError("a posterior prediction needs the future frame.", remedy="Pass `future`.")
            source_BND, latents = self._source_and_latents(current, future, draws, generator)
            latent_BZ = latents.posterior_BZ
        else:
            source_BND = self.encode_kept(current)
        if self.config.has_latent and not use_posterior:
            logits = self.prior_logits(source_BND[:, 0])
            sample = (
                draws.prior_sample if draws.prior_sample is not None else draw_sample(logits, self.config, generator)
            )
            latent_BZ = reparameterise(logits, sample, self.config)
        patches_BLV = self.predict_patches(self.future_memory(source_BND, latent_BZ)).float()
        if self.config.norm_pix_loss:
            reference = current if future is None else future
            mean, deviation = patch_statistics(patchify(reference, self.config.patch_size))
            patches_BLV = patches_BLV * deviation + mean
        return to_pixels(unpatchify(patches_BLV, self.config.patch_size, self.config.grid))

    def _add_decoder(self, prefix: str) -> None:
        config, width = self.config, self.config.decoder_embed_dim
        blocks = (CrossBlock(width, config.decoder_num_heads, config.mlp_ratio) for _ in range(config.decoder_depth))
        token = nn.init.normal_(torch.empty(1, 1, width), std=TOKEN_DEVIATION)
        self.register_parameter(f"{prefix}mask_token", nn.Parameter(token))
        self.add_module(f"{prefix}decoder_blocks", nn.ModuleList(blocks))
        self.add_module(f"{prefix}decoder_norm", layer_norm(width))
        self.add_module(f"{prefix}decoder_pred", nn.Linear(width, config.patch_values))

    def _parts(self, *, masked: bool) -> DecoderParts:
        prefix = "masked_" if masked and self.config.separate_decoder else ""
        names = ("mask_token", "decoder_blocks", "decoder_norm", "decoder_pred")
        return DecoderParts(*(getattr(self, prefix + name) for name in names))

    def _decode_both(self, future_memory: Memory, masked_memory: Memory) -> list[torch.Tensor]:
        if self.config.separate_decoder:
            return self.decode([future_memory]) + self.decode([masked_memory], masked=True)
        return self.decode([future_memory, masked_memory])

    def _predict(self, rows: torch.Tensor, *, masked: bool = False) -> torch.Tensor:
        parts = self._parts(masked=masked)
        return full_precision(parts.head(parts.norm(rows)))

    def _check_images(self, current: torch.Tensor, future: torch.Tensor) -> None:
        side = self.config.image_size
        if current.shape != future.shape or tuple(current.shape[1:]) != (3, side, side):
            shapes = f"current {tuple(current.shape)} and future {tuple(future.shape)}"
            raise InputError(f"{shapes} are not equal batches of 3x{side}x{side}.", remedy="Resize to image_size.")

    def _targets(self, future: torch.Tensor) -> torch.Tensor:
        patches = full_precision(patchify(future, self.config.patch_size))
        if not self.config.norm_pix_loss:
            return patches
        mean, deviation = patch_statistics(patches)
        return (patches - mean) / deviation

    def _source_and_latents(
        self, current: torch.Tensor, future: torch.Tensor, draws: RSPDraws, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, Latents]:
        if not self.config.has_latent:
            return self.encode_kept(current), Latents(None, None, None)
        source_BND, target_class = self._encode_frames(current, future, draws.future_noise, generator)
        source_class = source_BND[:, 0]
        posterior, prior = self.posterior_logits(source_class, target_class), self.prior_logits(source_class)
        samples = [
            draw_sample(logits, self.config, generator) if given is None else given
            for logits, given in ((posterior, draws.posterior_sample), (prior, draws.prior_sample))
        ]
        posterior_BZ = reparameterise(posterior, samples[0], self.config)
        prior_BZ = reparameterise(prior.detach(), samples[1], self.config)
        return source_BND, Latents(posterior_BZ, prior_BZ, balanced_kl(posterior, prior, self.config))

    def _encode_frames(
        self,
        current: torch.Tensor,
        future: torch.Tensor,
        noise: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens of the current frame, and the class token (B, D) of the corrupted future frame.

        Nothing else sees the corruption: targets and masked autoencoding take the clean frame.
        """
        options: dict[str, Any] = {"generator": generator, "device": future.device, "dtype": future.dtype}
        if self.config.target_corruption == "mask":
            if noise is None:
                noise = torch.rand(len(future), self.config.num_patches, **options)
            kept = random_masking(noise, self.config.target_mask_ratio).kept_BK
            return self.encode_kept(current), self.encode_kept(future, kept, class_only=True)[:, 0]
        if noise is None:
            noise = torch.randn(future.shape, **options)
        source_BND, target_B1D = self.encode_pair(current, future + self.config.noise_scale * noise)
        return source_BND, target_B1D[:, 0]

    def _masking(self, future: torch.Tensor, draws: RSPDraws, generator: torch.Generator | None) -> Masking | None:
        if not self.config.masked_autoencoding:
            return None
        noise = draws.mask_noise
        if noise is None:
            noise = torch.rand(len(future), self.config.num_patches, generator=generator, device=future.device)
        return random_masking(noise, self.config.mask_ratio)

    def _kl(self, latents: Latents, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if latents.kl_B is None:
            return like.new_zeros(()), like.new_zeros(())
        return clip_kl(latents.kl_B, self.config)

    @torch.no_grad()
    def _prior_loss(self, source_BND: torch.Tensor, latents: Latents, targets_BLV: torch.Tensor) -> torch.Tensor:
        patches = self.predict_patches(self.future_memory(source_BND, latents.prior_BZ))
        return (patches - targets_BLV).square().mean()


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
