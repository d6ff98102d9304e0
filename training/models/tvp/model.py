"""Text-guided video prediction: a video diffusion model that continues a first frame as a sentence says.

Sources: VPP (arXiv 2412.14803) section 3 stage 1 and its official code, which wins where they differ; see README.md.
Shape letters: B clips, T frames, C latent channels, h, w latents, H, W pixels, L tokens, D their width.
Latents are scaled (times `scale`) unless a name says raw. Sizes come from modules and tensors, not from the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from training.models.tvp.attention import share_text
from training.models.tvp.autoencoder import ENCODE_CHUNK, decode_clips, encode_frames, on_one_device, random_autoencoder
from training.models.tvp.config import TVPConfig, UNetConfig, VAEConfig
from training.models.tvp.features import FeatureTap, Interpolation
from training.models.tvp.sampler import euler_sample
from training.models.tvp.schedule import full_precision, precondition


class TVPDraws(NamedTuple):
    """Every random number of a training loss, each optional; what is None is drawn.

    Unit normal except `text_keep`. The sigmas may have any shape with one number a clip (or one number in all).
    """

    text_keep: torch.Tensor | None = None  # (B,) uniform; the text stays where it is > the dropout's share
    sigma_noise: torch.Tensor | None = None  # (B, 1, 1, 1, 1)
    latent_noise: torch.Tensor | None = None  # (B, T, C, h, w)
    image_sigma_noise: torch.Tensor | None = None  # (B, 1, 1, 1, 1), pixel path only
    image_noise: torch.Tensor | None = None  # (B, 1, 3, H, W) or (B, 3, H, W), pixel path only


class Condition(NamedTuple):
    """What the network is told besides text: the first frame and how much noise its picture got."""

    raw_B1Chw: torch.Tensor  # not scaled, as Stable Video Diffusion expects
    strength_B: torch.Tensor


class TextGuidedVideoModel(nn.Module):
    """UNet and autoencoder of Stable Video Diffusion with text tokens in the place of its image embedding.

    Only the UNet is trained; the autoencoder is frozen and stays in eval mode.
    """

    def __init__(self, config: TVPConfig, unet: Any, vae: Any) -> None:
        super().__init__()
        self.config = config
        self.unet = unet
        share_text(unet)
        self.vae = vae.eval().requires_grad_(False)

    @classmethod
    def random(cls, config: TVPConfig) -> Self:
        """Fresh modules of the config's sizes, drawn from torch's generator."""
        return cls(
            config,
            random_unet(config.unet, config.vae.latent_channels, config.num_frames),
            random_autoencoder(config.vae),
        )

    @property
    def scale(self) -> float:
        """What unscaled latents are multiplied with."""
        return float(self.vae.config.scaling_factor)

    def true_config(self) -> TVPConfig:
        """The config with the sizes of the modules that are really here."""
        unet = {name: self.unet.config[name] for name in UNetConfig.model_fields}
        vae = {name: self.vae.config[name] for name in VAEConfig.model_fields}
        update = {"unet": UNetConfig.parse(unet), "vae": VAEConfig.parse(vae)}
        return self.config.model_copy(update=update)

    def train(self, mode: bool = True) -> Self:
        """As in torch, but the autoencoder stays in eval mode."""
        super().train(mode)
        self.vae.eval()
        return self

    def checkpoint_activations(self, enabled: bool) -> None:
        """Whether the backward pass computes the UNet's inner activations again instead of keeping them."""
        if enabled:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()

    def encode(self, pixels_BT3HW: torch.Tensor, *, chunk: int = ENCODE_CHUNK) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels in [-1, 1] -> posterior mean and deviation (B, T, C, h, w), not scaled; `chunk` frames at once."""
        mean, std = encode_frames(self.vae, pixels_BT3HW.flatten(0, 1), chunk=chunk)
        shape = pixels_BT3HW.shape[:2]
        return mean.unflatten(0, shape), std.unflatten(0, shape)

    def decode(self, latents_BTChw: torch.Tensor, *, chunk: int | None = None) -> torch.Tensor:
        """Scaled latents -> pixels (B, T, 3, H, W) in [-1, 1]; `chunk` frames (config: decode_chunk) at once."""
        pixels = decode_clips(self.vae, latents_BTChw / self.scale, chunk=chunk or self.config.decode_chunk)
        return pixels.clamp(-1, 1)

    def forward(
        self,
        latents_BTChw: torch.Tensor | None,
        tokens_BLD: torch.Tensor,
        draws: TVPDraws | None = None,
        *,
        pixels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The training loss, so that wrappers for several processes see one call."""
        return self.training_loss(latents_BTChw, tokens_BLD, draws, pixels=pixels, weights=weights)

    def training_loss(
        self,
        latents_BTChw: torch.Tensor | None,
        tokens_BLD: torch.Tensor,
        draws: TVPDraws | None = None,
        *,
        pixels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Mean over clips of `weights` (B,) (default 1) times the EDM loss, with text dropout.

        Without `pixels` the condition is the clip's own first latent, clean. With `pixels` (B, T, 3, H, W) in [-1, 1]
        it is the first picture with noise of log-normal strength, encoded; targets are then the posterior means of
        `pixels`, unless latents are given too.
        """
        draws = draws or TVPDraws()
        condition = None if pixels is None else self._noisy_condition(pixels, draws, generator)
        if latents_BTChw is None:
            if pixels is None:
                raise ValueError("training_loss needs latents or pixels")
            latents_BTChw = self.encode(pixels)[0] * self.scale
        latents = full_precision(latents_BTChw)
        options: dict[str, Any] = {"generator": generator, "device": latents.device, "dtype": latents.dtype}
        keep, sigma_noise, noise = draws[:3]
        keep = torch.rand(len(latents), **options) if keep is None else keep
        sigma_noise = torch.randn(len(latents), **options) if sigma_noise is None else sigma_noise
        noise = torch.randn(latents.shape, **options) if noise is None else noise
        kept = (keep.reshape(-1, 1, 1) > self.config.text_dropout).to(tokens_BLD.dtype)
        loss_B = self.per_clip_loss(
            latents, tokens_BLD * kept, sigma=self.sigmas(sigma_noise, len(latents)), noise=noise, condition=condition
        )
        return (loss_B if weights is None else loss_B * weights.to(loss_B)).mean()

    def sigmas(self, unit_normal: torch.Tensor, num_clips: int) -> torch.Tensor:
        """(B,) training noise levels: log-normal by the config."""
        per_clip = full_precision(unit_normal).reshape(-1).expand(num_clips)
        return (self.config.sigma_log_mean + self.config.sigma_log_std * per_clip).exp()

    def per_clip_loss(
        self,
        latents_BTChw: torch.Tensor,
        tokens_BLD: torch.Tensor,
        *,
        sigma: torch.Tensor,
        noise: torch.Tensor,
        condition: Condition | None = None,
    ) -> torch.Tensor:
        """(B,) weighted squared error of x0 over all frames, at noise levels (B,), text as given."""
        latents = full_precision(latents_BTChw)
        condition = condition or self.clean_condition(latents[:, :1])
        noisy = latents + _per_clip(sigma).to(latents) * noise.to(latents)
        predicted = self.denoise(noisy, tokens_BLD, sigma=sigma.to(latents), condition=condition)
        return x0_error(predicted, latents, sigma)

    def denoise(
        self, noisy_BTChw: torch.Tensor, tokens_BLD: torch.Tensor, *, sigma: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """The clean latents that noisy ones at levels (B,) are predicted to be."""
        factors = precondition(sigma)
        answer = self.network(
            noisy_BTChw * _per_clip(factors.c_in), factors.c_noise, tokens_BLD, condition=condition, fps=self.config.fps
        )
        return _per_clip(factors.c_out) * answer + _per_clip(factors.c_skip) * noisy_BTChw

    def network(
        self,
        scaled_BTChw: torch.Tensor,
        time_B: torch.Tensor,
        tokens_BLD: torch.Tensor,
        *,
        condition: Condition,
        fps: int,
    ) -> torch.Tensor:
        """The UNet's raw answer (B, T, C, h, w) in full precision; `scaled` already has unit deviation."""
        inputs = self.network_inputs(scaled_BTChw, tokens_BLD, condition=condition, fps=fps)
        return full_precision(self.unet(inputs[0], time_B, *inputs[1:]).sample)

    def network_inputs(
        self, scaled_BTChw: torch.Tensor, tokens_BLD: torch.Tensor, *, condition: Condition, fps: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents with the first frame behind them on channels (B, T, 2 C, h, w), tokens, ids (B, 3)."""
        first = condition.raw_B1Chw.expand(-1, scaled_BTChw.shape[1], -1, -1, -1)
        joined = torch.cat([scaled_BTChw, first.to(scaled_BTChw)], dim=2).to(self.unet.dtype)
        strength = full_precision(condition.strength_B).reshape(-1)
        ids = [torch.full_like(strength, float(value)) for value in (fps, self.config.motion_bucket)]
        return joined, tokens_BLD.to(joined), torch.stack([*ids, strength], dim=1)

    def clean_condition(self, first_B1Chw: torch.Tensor, *, strength: float = 0.0) -> Condition:
        """The condition from scaled latents of first frames; `strength` is only told, no noise is added."""
        return Condition(first_B1Chw / self.scale, first_B1Chw.new_full((len(first_B1Chw),), strength))

    def image_condition(self, image: torch.Tensor, *, strength: float = 0.0) -> Condition:
        """The condition from pictures (B, 3, H, W) or (B, 1, 3, H, W) in [-1, 1], or scaled latents (B, 1, C, h, w).

        Three channels are pixels. Pictures are encoded to the posterior's mean.
        """
        frames = image.unsqueeze(1) if image.ndim == 4 else image[:, :1]
        if frames.shape[2] != self.vae.config.in_channels:
            return self.clean_condition(full_precision(frames), strength=strength)
        mean, _ = self.encode(frames)
        return Condition(mean, mean.new_full((len(mean),), strength))

    def extract_features(
        self,
        images: torch.Tensor,
        text_tokens: torch.Tensor,
        *,
        unit_noise: torch.Tensor | None = None,
        layers: Sequence[int] = (0, 1),
        aggregate: bool = True,
        interpolation: Interpolation = "nearest",
        sigma: float | None = None,
        num_steps: int = 30,
        step: int = 1,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """(B, T, C, H, W) float32 of the UNet's up-blocks while it predicts what follows `images`; no gradients.

        Pictures (B, 3, H, W) in [-1, 1] or scaled latents (B, 1, C, h, w). With `aggregate` the outputs of all
        `layers` are brought to the last one's size and joined on channels, else only the last one is given. `step` k
        takes k - 1 Euler steps of `num_steps` first and taps the next pass; at step 1 the count does not matter.
        `sigma` is where the schedule starts (default 700). `unit_noise` (B, T, C, h, w) is unit normal.
        """
        tap = FeatureTap(tuple(layers), aggregate, interpolation, sigma, num_steps, step)
        condition = self.image_condition(images)
        noise = self._noise_like(condition, unit_noise, generator)
        return tap.extract(self, noise, text_tokens, condition)

    def sample(
        self,
        image: torch.Tensor,
        text_tokens: torch.Tensor,
        *,
        num_steps: int = 30,
        guidance: tuple[float, float] = (1.0, 3.0),
        unit_noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        fps: int | None = None,
    ) -> torch.Tensor:
        """Scaled latents (B, T, C, h, w) of a clip that starts with `image` (as for `extract_features`).

        One step gives the x0 prediction from the highest noise level. Guidance rises linearly over the frames.
        """
        condition = self.image_condition(image, strength=self.config.sample_condition_noise_id)
        noise = self._noise_like(condition, unit_noise, generator)
        fps = self.config.fps if fps is None else fps
        return euler_sample(self, noise, text_tokens, condition, num_steps=num_steps, guidance=guidance, fps=fps)

    def _noise_like(
        self, condition: Condition, noise: torch.Tensor | None, generator: torch.Generator | None
    ) -> torch.Tensor:
        first = condition.raw_B1Chw
        if noise is not None:
            return noise.to(first).expand(len(first), -1, -1, -1, -1)  # one draw may serve all clips
        shape = (len(first), self.config.num_frames, *first.shape[2:])
        return torch.randn(shape, generator=generator, device=first.device, dtype=first.dtype)

    def _noisy_condition(
        self, pixels_BT3HW: torch.Tensor, draws: TVPDraws, generator: torch.Generator | None
    ) -> Condition:
        first = full_precision(pixels_BT3HW[:, :1])
        options: dict[str, Any] = {"generator": generator, "device": first.device, "dtype": first.dtype}
        unit, noise = draws.image_sigma_noise, draws.image_noise
        unit = torch.randn(len(first), **options) if unit is None else full_precision(unit)
        noise = torch.randn(first.shape, **options) if noise is None else noise
        log_strength = self.config.condition_noise_log_mean + self.config.condition_noise_log_std * unit
        strength = log_strength.exp().reshape(-1).expand(len(first)).to(first)
        mean, _ = self.encode(first + _per_clip(strength) * noise.reshape(first.shape).to(first))
        return Condition(mean, strength)


def x0_error(predicted: torch.Tensor, latents_BTChw: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(B,) EDM loss of any denoiser's answer: mean of (sigma² + 1) / sigma² times its squared error."""
    return (predicted - latents_BTChw).square().flatten(1).mean(dim=1) * precondition(sigma).weight


def random_unet(config: UNetConfig, latent_channels: int = 4, num_frames: int = 16) -> Any:
    """A fresh UNetSpatioTemporalConditionModel of these sizes; its lowest level has no attention."""
    from diffusers import UNetSpatioTemporalConditionModel

    attending = len(config.block_out_channels) - 1
    unet = UNetSpatioTemporalConditionModel(
        sample_size=config.sample_size,
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * attending + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * attending,
        block_out_channels=config.block_out_channels,
        addition_time_embed_dim=config.addition_time_embed_dim,
        projection_class_embeddings_input_dim=3 * config.addition_time_embed_dim,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        num_attention_heads=config.num_attention_heads,
        num_frames=num_frames,
    )
    return on_one_device(unet)


def _per_clip(values_B: torch.Tensor) -> torch.Tensor:
    return values_B.view(-1, 1, 1, 1, 1)
