"""Features of still pictures for a policy: any encoder's tokens, as a feature provider of one frame.

Shape letters: B observations, V views, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from infra.digests import sha256_json
from infra.errors import InputError
from training.models.common.frozen import frame_features
from training.protocols import Encoder, Images

StillFeature = Literal["patch_tokens", "class_token"]


class EncoderFeatures:
    """The `FeatureProvider` of an encoder: (B, 1, N, C) patch tokens, or its class token alone."""

    def __init__(
        self, encoder: Encoder, *, cameras: Sequence[str] = ("main",), feature: StillFeature = "patch_tokens"
    ) -> None:
        self._encoder, self._feature = encoder, feature
        self.cameras = tuple(cameras)
        self.feature_dim = encoder.embed_dim
        tokens = (encoder.image_size // encoder.patch_size) ** 2 if feature == "patch_tokens" else 1
        self.feature_shape = (1, tokens * len(self.cameras), encoder.embed_dim)
        self.digest = sha256_json({"encoder": encoder.digest, "cameras": list(self.cameras), "feature": feature})

    def features(
        self, images: dict[str, Images], text: Sequence[str], *, unit_noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, 1, N, C) float32; the sentence is not looked at."""
        return joined_views(images, self.cameras, self._tokens)

    def _tokens(self, images: Images) -> torch.Tensor:
        tokens = frame_features(self._encoder, images, self._feature)
        return tokens[:, None] if self._feature == "class_token" else tokens


def joined_views(
    images: dict[str, Images], cameras: Sequence[str], tokens_of: Callable[[Images], torch.Tensor]
) -> torch.Tensor:
    """(B, 1, V * N, C) of the cameras' tokens, one view behind the other."""
    if missing := sorted(set(cameras) - set(images)):
        raise InputError(
            f"features need camera {', '.join(missing)}, there are {sorted(images)}.", remedy="Give its pictures."
        )
    return torch.cat([tokens_of(images[camera]) for camera in cameras], dim=1)[:, None]
