"""Predictive features of a frozen video model: what its up-blocks hold while it predicts what follows one picture.

VPP section 3.2 and the official extractor, which wins where they differ (docs/recipes/vpp.md).
Shape letters: B observations, V views, T frames, C channels, H, W the features' grid, N = V * H * W tokens, L text
tokens, h, w latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from infra.config import Config
from infra.digests import sha256_json
from infra.errors import ConfigError, InputError
from training.models.common.plain_features import joined_views
from training.models.tvp.autoencoder import FrozenVAE
from training.models.tvp.features import Interpolation
from training.models.tvp.predictor import FrozenVideoModel, to_model_range
from training.protocols import Images
from training.state import counter_seed

VIEWS_AT_ONCE = 16


class VideoTapConfig(Config):
    """Which activations of a video model are a policy's features; the defaults are the release's.

    `sigma` is the true noise level (None: the release's 700; its "time step" knob, here `num_steps`, changes nothing at
    `step` 1). `noise` "fixed" is one draw from `noise_seed` for all observations, as a deployed policy has it; "fresh"
    follows from `noise_seed` and the pictures. `pool` averages squares of that many tokens (1: off), `frames` keeps so
    many, evenly spread (0: all). `autocast` computes the UNet in bfloat16.
    """

    cameras: tuple[str, ...] = Field(default=("main",), min_length=1)
    layers: tuple[int, ...] = (0, 1)
    aggregate: bool = True
    interpolation: Interpolation = "nearest"
    sigma: float | None = Field(default=None, gt=0)
    num_steps: int = Field(default=20, ge=1)
    step: int = Field(default=1, ge=1)
    noise: Literal["fixed", "fresh"] = "fixed"
    noise_seed: int = Field(default=0, ge=0)
    pool: int = Field(default=1, ge=1)
    frames: int = Field(default=0, ge=0)
    autocast: bool = True

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.step > self.num_steps:
            raise ValueError(f"step {self.step} of {self.num_steps} does not exist")
        if len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"a camera is named twice in {self.cameras}")
        return self


class VideoFeatures:
    """The `FeatureProvider` of a video model. Views are one batch, all of the first camera before those of the next."""

    def __init__(self, model: FrozenVideoModel, config: VideoTapConfig, *, views_at_once: int = VIEWS_AT_ONCE) -> None:
        self._frozen, self._model, self.config = model, model.model, config
        self._views_at_once = views_at_once
        self.cameras = config.cameras
        self.frames = _kept_frames(config.frames, model.num_frames)
        grid, channels = self._grid()
        if any(side % config.pool for side in grid):
            raise ConfigError(
                f"pool = {config.pool} does not divide the features' grid of {grid[0]} x {grid[1]}.",
                remedy="Take a divisor, or 1.",
            )
        tokens = len(config.cameras) * (grid[0] // config.pool) * (grid[1] // config.pool)
        self.feature_shape = (len(self.frames), tokens, channels)
        self.feature_dim = channels
        self.digest = tap_digest(model.digest, config)

    @torch.no_grad()
    def features(
        self, images: dict[str, Images], text: Sequence[str], *, unit_noise: torch.Tensor | None = None, draw: int = 0
    ) -> torch.Tensor:
        """(B, T, N, C) float32 on the model's device; tokens row by row, one view behind the other.

        `unit_noise` (1, B or V B; T of the model, C, h, w) is standard normal and replaces the provider's own. `draw`
        numbers that: 0 is the one a policy acts with, further ones are as it might have been drawn.
        """
        if missing := sorted(set(self.cameras) - set(images)):
            raise InputError(
                f"features need camera {', '.join(missing)}, there are {sorted(images)}.", remedy="Give its pictures."
            )
        views = [images[camera] for camera in self.cameras]
        noise = self._noise(views, draw) if unit_noise is None else unit_noise
        count = len(views) * len(text)
        if len(noise) not in (1, count):
            noise = noise.repeat(len(views), 1, 1, 1, 1)  # one draw an observation serves all its views
        pixels = torch.cat(
            [to_model_range(view, self._frozen.image_size, device=self._frozen.device) for view in views]
        )
        tokens = self._frozen.tokens(list(text) * len(views))
        parts = []
        for start in range(0, count, self._views_at_once):
            chosen = slice(start, start + self._views_at_once)
            parts.append(self._tap(pixels[chosen], tokens[chosen], noise if len(noise) == 1 else noise[chosen]))
        by_view = torch.cat(parts).unflatten(0, (len(views), len(text)))
        return torch.cat(list(by_view), dim=2)

    def _tap(self, pixels: torch.Tensor, tokens_BLD: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        config = self.config
        with torch.autocast(self._frozen.device.type, torch.bfloat16, enabled=config.autocast):
            found_BTCHW = self._model.extract_features(
                pixels, tokens_BLD, unit_noise=noise.to(pixels.device), layers=config.layers,
                aggregate=config.aggregate, interpolation=config.interpolation, sigma=config.sigma,
                num_steps=config.num_steps, step=config.step,
            )  # fmt: skip
        kept = found_BTCHW[:, self.frames].float()
        pooled = F.avg_pool2d(kept.flatten(0, 1), config.pool) if config.pool > 1 else kept.flatten(0, 1)
        return pooled.flatten(2).transpose(1, 2).unflatten(0, kept.shape[:2])

    def _noise(self, views: Sequence[Images], draw: int) -> torch.Tensor:
        """(1 or V B, T, C, h, w): one for all observations, or one for every picture."""
        seed = self.config.noise_seed
        if self.config.noise == "fixed":
            return self._normal(counter_seed(seed, "fixed features", draw))
        keys = [hashlib.sha256(picture.tobytes()).hexdigest() for view in views for picture in view]
        return torch.cat([self._normal(counter_seed(seed, "features", key, draw)) for key in keys])

    def _normal(self, seed: int) -> torch.Tensor:
        return torch.randn(1, *self._latent_shape(), generator=torch.Generator().manual_seed(seed))

    def _latent_shape(self) -> tuple[int, int, int, int]:
        side = self._frozen.image_size // 2 ** (len(self._model.vae.config.block_out_channels) - 1)
        return self._frozen.num_frames, int(self._model.vae.config.latent_channels), side, side

    def _grid(self) -> tuple[tuple[int, int], int]:
        """(height and width, channels) of the features, from sizes alone."""
        config, unet = self.config, self._model.unet
        if max(config.layers) >= len(unet.up_blocks):
            raise ConfigError(
                f"layers {config.layers}: the video model has up-blocks 0 to {len(unet.up_blocks) - 1}.",
                remedy="E.g. layers=[0,1].",
            )
        widths = list(reversed(unet.config.block_out_channels))
        halvings = len(widths) - 1
        side = self._latent_shape()[-1]
        # Every block but the last doubles what comes in; rounding on the way down is undone on the way up.
        sides = [side]
        for _ in range(halvings):
            sides.append((sides[-1] + 1) // 2)
        last = max(config.layers)
        found = sides[max(0, halvings - last - 1)]
        taken = config.layers if config.aggregate else config.layers[-1:]
        return (found, found), sum(widths[layer] for layer in taken)


def tap_digest(model_digest: str, config: VideoTapConfig) -> str:
    """What names features: the model's weights and every setting that decides them."""
    return sha256_json(
        {"model": model_digest, "tap": {name: config.to_json()[name] for name in VideoTapConfig.model_fields}}
    )


def _kept_frames(count: int, total: int) -> list[int]:
    """`count` of `total` frames, evenly spread, first and last among them; 0: all."""
    if count > total:
        raise ConfigError(f"frames = {count}: the video model predicts {total}.", remedy="Take fewer.")
    if count == 0:
        return list(range(total))
    return [int(place * (total - 1) / max(1, count - 1)) for place in range(count)]


class VAEFeatures:
    """The `FeatureProvider` of an autoencoder alone: scaled posterior means as tokens of one frame (VPP table 3)."""

    def __init__(self, vae: FrozenVAE, *, cameras: Sequence[str] = ("main",), pool: int = 1) -> None:
        self._vae, self._pool = vae, pool
        self.cameras = tuple(cameras)
        side = vae.image_size // vae.config.downscale
        if side % pool:
            raise ConfigError(f"pool = {pool} does not divide latents of {side} x {side}.", remedy="Take a divisor.")
        self.feature_dim = vae.config.latent_channels
        self.feature_shape = (1, len(self.cameras) * (side // pool) ** 2, self.feature_dim)
        self.digest = sha256_json(
            {"vae": vae.digest, "scale": vae.scale, "size": vae.image_size, "pool": pool, "cameras": list(cameras)}
        )

    def features(
        self, images: dict[str, Images], text: Sequence[str], *, unit_noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, 1, N, C) float32, row by row; the sentence is not looked at."""
        return joined_views(images, self.cameras, self._tokens)

    def _tokens(self, images: Images) -> torch.Tensor:
        mean, _ = self._vae.encode(to_model_range(images, self._vae.image_size, device=self._vae.vae.device))
        pooled = F.avg_pool2d(mean * self._vae.scale, self._pool) if self._pool > 1 else mean * self._vae.scale
        return pooled.float().flatten(2).transpose(1, 2)
