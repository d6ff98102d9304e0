"""What evaluation may know of a model: these four protocols and nothing else.

Shape letters: B batch, T frames, V views, H height, W width, C channels, N tokens, D width, A action, P proprioception.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Observation:
    """What a policy sees of B environments at once.

    `images` maps a camera to (B, H, W, 3) uint8 RGB, and is empty for a policy that `needs_images` denies;
    `proprioception` is (B, P) float32; `text` has B sentences. `keys` name the B episodes ("drawer-open/10003"): a
    policy's random draws follow from them, so that a rollout does not depend on its neighbours in the batch. Without
    keys the place in the batch is the key.
    """

    images: dict[str, Images]
    proprioception: npt.NDArray[np.float32]
    text: tuple[str, ...]
    keys: tuple[str, ...] = ()


@runtime_checkable
class Encoder(Protocol):
    """A frozen image encoder: patch tokens and a class token."""

    embed_dim: int
    patch_size: int
    image_size: int  # the side it was trained at
    digest: str  # sha256 of the weights file, or of the seed for a random one

    def preprocess(self, images_BHWC: Images, size: tuple[int, int] | None = None) -> torch.Tensor:
        """uint8 RGB of any size -> normalised float32 (B, 3, H, W) at `size` (default: the training side)."""
        ...

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 1 + H/p * W/p, D): class token first, after the final norm."""
        ...


@runtime_checkable
class FeatureProvider(Protocol):
    """Predictive or plain features for a policy: (B, T, N, C), T = 1 for a still encoder.

    Tokens of several cameras lie behind one another on N, in the order of `cameras`.
    """

    feature_shape: tuple[int, int, int]  # (T, N, C), known without computing any
    feature_dim: int
    cameras: tuple[str, ...]
    digest: str  # of the weights and of everything else that decides the features

    def features(
        self, images: dict[str, Images], text: Sequence[str], *, unit_noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """uint8 RGB per camera (B, H, W, 3) and B sentences -> (B, T, N, C) float32.

        `unit_noise` replaces the provider's own draw where it makes one (video models); others ignore it.
        """
        ...


@runtime_checkable
class VideoPredictor(Protocol):
    """A frozen text-guided video model. Everything drawn at random is a function of `seed` and the item's key."""

    num_frames: int
    image_size: int
    digest: str

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
        """First frames (any size) and sentences -> (B, T, S, S, 3) uint8; frame 0 is the model's own.

        `num_steps=1` is the one-step prediction from the highest sigma. `guidance` rises linearly from the first
        frame's weight to the last one's.
        """
        ...

    def reconstruct(self, videos_BTHWC: Images) -> Images:
        """Encode and decode: what the autoencoder alone loses. (B, T, S, S, 3) uint8."""
        ...

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
        """(B,) training loss of each clip, averaged over `num_draws` fixed pairs of sigma and noise, without dropout.

        The draws of a clip follow from (seed, its key, the draw's number) alone, so clips of two models pair, in any
        batch. `copy_first_frame` rates the denoiser that always answers with the first frame: a floor.
        """
        ...


@runtime_checkable
class Policy(Protocol):
    """A closed-loop policy over a batch of environments.

    A policy may have `timings`: seconds of the parts of its last `act`, by name.
    """

    needs_images: bool
    action_horizon: int  # actions executed before the next `act`
    digest: str

    def reset(self, batch_size: int) -> None:
        """Forget everything; the next `act` belongs to new episodes."""
        ...

    def act(self, observation: Observation) -> npt.NDArray[np.float32]:
        """-> action chunk (B, action_horizon, A) in the environment's units, within [-1, 1] for Meta-World."""
        ...
