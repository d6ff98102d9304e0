"""A trained video model as evaluation sees it: the `VideoPredictor` protocol, from uint8 pictures to uint8 clips.

Shape letters: B clips, T frames, H, W any size, S the model's own size, C latent channels, h, w latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from infra.errors import ConfigError, InputError
from training.models.common.text import TokenEncoder
from training.models.tvp.config import TVPConfig
from training.models.tvp.model import TextGuidedVideoModel, x0_error
from training.models.tvp.text import encode_text
from training.protocols import Images
from training.state import counter_seed

CLIPS_AT_ONCE = 8


class FrozenVideoModel:
    """A video model in eval mode. `autocast` computes the UNet in bfloat16, everything around it in float32.

    `clips_at_once` bounds memory and changes no result beyond rounding: every draw belongs to one clip.
    """

    def __init__(
        self,
        model: TextGuidedVideoModel,
        *,
        digest: str,
        text: TokenEncoder | None = None,
        autocast: bool = False,
        clips_at_once: int = CLIPS_AT_ONCE,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config: TVPConfig = model.config
        self.num_frames = model.config.num_frames
        self.image_size = model.config.image_size
        self.digest = digest
        self.autocast = autocast
        self.clips_at_once = clips_at_once
        self._text = text

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.unet.device)

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; pictures follow them."""
        self.model.to(device)
        return self

    def tokens(self, sentences: Sequence[str]) -> torch.Tensor:
        """(B, L, D) tokens for the UNet; `ConfigError` when the text encoder's width does not fit it."""
        if self._text is None:
            self._text = TokenEncoder(self.config.text)
        wanted = self.model.unet.config.cross_attention_dim
        if 2 * self._text.dim != wanted:
            raise ConfigError(
                f"the {self.config.text.kind} text encoder gives 2 x {self._text.dim} numbers a token, "
                f"the UNet attends to {wanted}.",
                remedy="Name the text encoder that the weights were trained with (text.kind, text.path).",
            )
        tokens = encode_text(self._text.encode(sentences), position_code=self.config.position_code)
        return tokens.to(self.device)

    @torch.no_grad()
    def predict(
        self,
        images_BHWC: Images,
        text: Sequence[str],
        *,
        num_steps: int = 30,
        guidance: tuple[float, float] = (1.0, 3.0),
        unit_noise: torch.Tensor | None = None,
        seed: int = 0,
    ) -> Images:
        """First frames (B, H, W, 3) and sentences -> (B, T, S, S, 3) uint8; frame 0 is the model's own.

        A clip's noise follows from (seed, its picture), so texts are compared at equal noise, in any batch.
        `unit_noise` (B or 1, T, C, h, w) replaces it.
        """
        self._check(images_BHWC, 4, text)
        tokens = self.tokens(text)
        parts = []
        for chosen in self._parts(len(images_BHWC)):
            frames = images_BHWC[chosen]
            first, _ = self.model.encode(self._pixels(frames)[:, None])
            first = first * self.model.scale
            noise = self._noise(frames, first, seed) if unit_noise is None else _rows(unit_noise, chosen)
            with self._precision():
                latents = self.model.sample(
                    first, tokens[chosen], num_steps=num_steps, guidance=guidance, unit_noise=noise.to(first)
                )
            parts.append(to_uint8(self.model.decode(latents)))
        return self._joined(parts)

    @torch.no_grad()
    def reconstruct(self, videos_BTHWC: Images) -> Images:
        """Encode (posterior mean) and decode: what the autoencoder alone loses. (B, T, S, S, 3) uint8."""
        self._check(videos_BTHWC, 5)
        parts = []
        for chosen in self._parts(len(videos_BTHWC)):
            parts.append(to_uint8(self.model.decode(self._latents(videos_BTHWC[chosen]))))
        return self._joined(parts)

    @torch.no_grad()
    def validation_losses(
        self,
        videos_BTHWC: Images,
        text: Sequence[str],
        *,
        keys: Sequence[str],
        num_draws: int = 8,
        seed: int = 0,
        copy_first_frame: bool = False,
    ) -> npt.NDArray[np.float32]:
        """(B,) training loss of each clip, latent path, averaged over `num_draws` fixed pairs of sigma and noise.

        No dropout. The draws of a clip follow from (seed, its key, the draw's number) alone. `copy_first_frame`
        rates the denoiser that always answers with the first frame; the text is then not looked at.
        """
        self._check(videos_BTHWC, 5, text)
        if len(keys) != len(videos_BTHWC):
            raise InputError(f"{len(keys)} keys for {len(videos_BTHWC)} clips.", remedy="Give one key a clip.")
        tokens = None if copy_first_frame else self.tokens(text)
        losses = np.zeros(len(keys), np.float64)
        for chosen in self._parts(len(keys)):
            latents = self._latents(videos_BTHWC[chosen])
            for draw in range(num_draws):
                draws = [_fixed_draw(seed, key, draw, latents.shape[1:]) for key in keys[chosen]]
                sigma = self.model.sigmas(torch.stack([unit for unit, _ in draws]).to(latents), len(latents))
                noise = torch.stack([noise for _, noise in draws]).to(latents)
                if tokens is None:
                    loss = x0_error(latents[:, :1], latents, sigma)
                else:
                    with self._precision():
                        loss = self.model.per_clip_loss(latents, tokens[chosen], sigma=sigma, noise=noise)
                losses[chosen] += loss.double().cpu().numpy()
        return (losses / num_draws).astype(np.float32)

    def _latents(self, videos_BTHWC: Images) -> torch.Tensor:
        clips = videos_BTHWC.shape[:2]
        pixels = self._pixels(videos_BTHWC.reshape(-1, *videos_BTHWC.shape[2:])).unflatten(0, clips)
        return self.model.encode(pixels)[0] * self.model.scale

    def _pixels(self, images_NHWC: Images) -> torch.Tensor:
        return to_model_range(images_NHWC, self.image_size, device=self.device)

    def _noise(self, images_BHWC: Images, first_B1Chw: torch.Tensor, seed: int) -> torch.Tensor:
        shape = (self.num_frames, *first_B1Chw.shape[2:])
        seeds = [counter_seed(seed, "predict", hashlib.sha256(image.tobytes()).hexdigest()) for image in images_BHWC]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(value)) for value in seeds])

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def _parts(self, count: int) -> list[slice]:
        return [slice(start, start + self.clips_at_once) for start in range(0, count, self.clips_at_once)]

    def _joined(self, parts: list[Images]) -> Images:
        if not parts:
            return np.zeros((0, self.num_frames, self.image_size, self.image_size, 3), np.uint8)
        return np.concatenate(parts)

    def _check(self, images: Images, ndim: int, text: Sequence[str] | None = None) -> None:
        if images.ndim != ndim or images.shape[-1] != 3 or images.dtype != np.uint8:
            letters = "(B, H, W, 3)" if ndim == 4 else "(B, T, H, W, 3)"
            raise InputError(
                f"pictures are {images.dtype} {images.shape} where uint8 {letters} is needed.",
                remedy="Pass RGB frames.",
            )
        if text is not None and len(text) != len(images):
            raise InputError(f"{len(text)} sentences for {len(images)} clips.", remedy="Give one sentence a clip.")


def to_model_range(images_NHWC: Images, size: int, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 RGB of any size -> float32 (N, 3, S, S) in [-1, 1], resized as in training: bilinear, squashed."""
    # A copy: torch takes neither read-only arrays nor the negative strides of a reversed one.
    pixels = torch.from_numpy(np.array(images_NHWC, order="C")).to(device).permute(0, 3, 1, 2).float()
    if tuple(pixels.shape[-2:]) != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
    return pixels / 127.5 - 1


def to_uint8(pixels_BT3HW: torch.Tensor) -> Images:
    """Pixels in [-1, 1] -> (B, T, H, W, 3) uint8, rounded."""
    levels = ((pixels_BT3HW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 1, 3, 4, 2).cpu().numpy()


def _fixed_draw(seed: int, key: str, draw: int, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(counter_seed(seed, "validation", key, draw))
    return torch.randn((), generator=generator), torch.randn(tuple(shape), generator=generator)


def _rows(noise: torch.Tensor, chosen: slice) -> torch.Tensor:
    return noise if len(noise) == 1 else noise[chosen]
