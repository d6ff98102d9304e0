"""Frozen image encoders as evaluation and policies see them: the `Encoder` protocol over stored or random weights.

Shape letters: B batch, H height, W width, C channels, N = 1 + L tokens, D width.
"""

from __future__ import annotations

from typing import Literal, Self

import torch

from infra.digests import sha256_json
from infra.errors import InputError
from training.models.common.images import Preprocessing, preprocess
from training.models.common.patches import patchify
from training.models.common.vit import EncoderConfig, VisionTransformer
from training.models.common.weights import load_weights
from training.protocols import Encoder, Images

FeatureKind = Literal["class_token", "patch_tokens"]


class FrozenEncoder:
    """A vision transformer in eval mode, without gradients. `autocast` computes in bfloat16 and returns float32."""

    def __init__(
        self,
        config: EncoderConfig,
        weights: dict[str, torch.Tensor] | None = None,
        *,
        preprocessing: Preprocessing,
        digest: str,
        autocast: bool = False,
    ) -> None:
        # The loaded weights replace the drawn ones, so the caller's random stream must not notice the drawing.
        with torch.random.fork_rng(devices=[]):
            self.model = VisionTransformer(config)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.eval().requires_grad_(False)
        self.config = config
        self.preprocessing = preprocessing
        self.embed_dim = config.embed_dim
        self.patch_size = config.patch_size
        self.image_size = config.image_size
        self.digest = digest
        self.autocast = autocast

    @classmethod
    def stored(
        cls,
        config: EncoderConfig,
        weights: dict[str, torch.Tensor],
        preprocessing: Preprocessing,
        digest: str,
        *,
        autocast: bool = False,
    ) -> Self:
        """An encoder of an export's weights; `InputError` names those that do not fit."""
        encoder = cls(plain_config(config), preprocessing=preprocessing, digest=digest, autocast=autocast)
        load_weights(encoder.model, weights)
        return encoder

    @classmethod
    def random(cls, config: EncoderConfig, preprocessing: Preprocessing, *, seed: int) -> Self:
        """The same architecture with fresh weights; equal seeds give equal weights, whatever was drawn before."""
        digest = sha256_json({"random_encoder": config.to_json(), "seed": seed})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights = VisionTransformer(config).state_dict()
        return cls(config, weights, preprocessing=preprocessing, digest=digest)

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; images given to `encode` follow them."""
        self.model.to(device)
        return self

    def preprocess(self, images_BHWC: Images, size: tuple[int, int] | None = None) -> torch.Tensor:
        """uint8 RGB of any size -> normalised float32 (B, 3, H, W) at `size` (default: the training side)."""
        return preprocess(images_BHWC, self.preprocessing, size or (self.image_size, self.image_size))

    @torch.no_grad()
    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 1 + H/p * W/p, D) float32: class token first, after the final norm."""
        device = self.model.cls_token.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            return self.model.encode(images_BCHW.to(device)).float()


def plain_config(config: EncoderConfig) -> EncoderConfig:
    """Only the encoder's fields, so that a digest or a policy's config does not carry the pre-training's."""
    return EncoderConfig(**{name: getattr(config, name) for name in EncoderConfig.model_fields})


class RawPatches:
    """No model at all: a patch's colour values are its token, their mean the class token. A control arm."""

    def __init__(self, patch_size: int, *, image_size: int) -> None:
        self.embed_dim = 3 * patch_size**2
        self.patch_size = patch_size
        self.image_size = image_size
        self.preprocessing = Preprocessing(image_size=image_size)
        self.digest = sha256_json({"raw_patches": patch_size, "image_size": image_size})

    def preprocess(self, images_BHWC: Images, size: tuple[int, int] | None = None) -> torch.Tensor:
        """uint8 RGB of any size -> normalised float32 (B, 3, H, W) at `size` (default: `image_size` squared)."""
        return preprocess(images_BHWC, self.preprocessing, size or (self.image_size, self.image_size))

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 1 + H/p * W/p, 3 p²)."""
        patches = patchify(images_BCHW, self.patch_size)
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)


def frame_features(encoder: Encoder, images_BHWC: Images, kind: FeatureKind, *, batch_size: int = 64) -> torch.Tensor:
    """Frozen features of pictures on the CPU: (B, D) class tokens or (B, L, D) patch tokens, at the training side."""
    if images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3 or images_BHWC.dtype.name != "uint8":
        shape = f"{images_BHWC.dtype} {images_BHWC.shape}"
        raise InputError(f"pictures are {shape} where uint8 (B, H, W, 3) is needed.", remedy="Pass RGB frames.")
    parts = []
    for start in range(0, len(images_BHWC), batch_size):
        tokens = encoder.encode(encoder.preprocess(images_BHWC[start : start + batch_size])).cpu()
        parts.append(tokens[:, 0] if kind == "class_token" else tokens[:, 1:])
    return torch.cat(parts)
