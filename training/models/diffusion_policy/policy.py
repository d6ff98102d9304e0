"""The stored Diffusion Policy in closed loop: the `Policy` protocol, its draws keyed by episode and decision.

Shape letters: B environments, V cameras, S side, T history, P proprioception, R draws, K chunk, A action.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch

from infra.errors import InputError
from training.models.common.images import Preprocessing
from training.models.common.pictures import central_crop, episode_noise, state_of, views
from training.models.common.text import SentenceEncoder
from training.models.diffusion_policy.config import StoredDiffusionPolicy
from training.models.diffusion_policy.model import DiffusionPolicyNetwork
from training.protocols import Observation

HALF = (0.5, 0.5, 0.5)


class DiffusionPolicy:
    """Deterministic for equal observations, keys and decision numbers since the last reset."""

    needs_images = True

    def __init__(
        self,
        network: DiffusionPolicyNetwork,
        config: StoredDiffusionPolicy,
        *,
        text: SentenceEncoder | None = None,
        digest: str = "",
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config = config
        self.text = text or SentenceEncoder()
        self.digest = digest
        self.cameras = config.network.cameras
        self.action_horizon = config.network.execute
        self.timings: dict[str, float] = {}
        self.reset(0)

    @property
    def preprocessing(self) -> Preprocessing:
        """Pixels in [-1, 1], squashed to a square."""
        size = self.config.network.image_size
        return Preprocessing(image_size=size, mean=HALF, std=HALF, interpolation="bilinear", antialias=True)

    def reset(self, batch_size: int) -> None:
        """Forget the pictures seen; the next `act` is the first decision of new episodes."""
        self._history: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._decision = 0

    @torch.no_grad()
    def act(self, observation: Observation) -> npt.NDArray[np.float32]:
        """-> (B, execute, A) in the environment's units."""
        config, codec = self.config.network, self.config.codec
        device = self.network.head.alpha_bars.device
        started = time.perf_counter()
        state = state_of(observation)
        images, states = self._look(observation, codec.state(state))
        text = self.text.encode(observation.text) if config.text_dim else torch.zeros(len(state), 0)
        condition = self.network.condition(images.to(device), states.to(device), text.to(device))
        encoded = time.perf_counter()
        shape = (config.diffusion.draws, config.chunk, config.action_dim)
        seed = self.config.seed
        noise = episode_noise(observation, shape, seed=seed, purpose="act", decision=self._decision)
        chunk = self.network.head.sample(condition, noise.to(device)).cpu()
        self._decision += 1
        self.timings = {"encoder": encoded - started, "denoiser": time.perf_counter() - encoded}
        return codec.decode(chunk, state)[:, : config.execute].numpy()

    def _look(self, observation: Observation, state_BP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, V, T, c, c, 3) and (B, T, P) of this decision and earlier ones; the first stands in for missing ones."""
        config = self.config.network
        pictures = views(observation, config.cameras, config.image_size, antialias=True)
        latest = (central_crop(pictures, config.crop), state_BP)
        if self._history and len(self._history[-1][1]) != len(state_BP):
            raise InputError(
                f"batch of {len(state_BP)} after one of {len(self._history[-1][1])}.",
                remedy="Call reset between episodes.",
            )
        self._history = [*(self._history or [latest] * (config.history - 1)), latest][-config.history :]
        images, states = zip(*self._history, strict=True)
        return torch.stack(images, dim=2), torch.stack(states, dim=1)
