"""Susie style policy: the video model's last frame is the sub-goal, a goal-conditioned diffusion policy goes there.

Shape letters: B environments, S side, P proprioception, R draws, K chunk, A action.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch

from infra.errors import InputError
from training.models.common.images import Preprocessing
from training.models.common.pictures import central_crop, episode_noise, state_of, views
from training.models.common.planning import Planner
from training.models.subgoal.config import StoredSubgoalPolicy
from training.models.subgoal.model import SubgoalNetwork
from training.protocols import Observation, VideoPredictor

HALF = (0.5, 0.5, 0.5)


class SusiePolicy:
    """A new sub-goal every `subgoal_every` steps, an action chunk every `execute`.

    Deterministic for equal observations, keys and decision numbers. `noise_shape` is (T, C, h, w) of the video model's
    latents. `InputError` when the model's frames do not fit.
    """

    needs_images = True

    def __init__(
        self,
        network: SubgoalNetwork,
        video: VideoPredictor,
        config: StoredSubgoalPolicy,
        *,
        noise_shape: tuple[int, int, int, int],
        digest: str = "",
    ) -> None:
        if video.image_size != config.network.image_size:
            raise InputError(
                f"a policy of {config.network.image_size} pixels with sub-goals of {video.image_size}.",
                remedy="Train it at the video model's size.",
            )
        self.network = network.eval().requires_grad_(False)
        self.planner = Planner(video, config.plan, camera=config.camera, noise_shape=noise_shape)
        self.config = config
        self.digest = digest
        self.cameras = (config.camera,)
        self.action_horizon = config.network.execute
        self.timings: dict[str, float] = {}
        self.reset(0)

    @property
    def preprocessing(self) -> Preprocessing:
        """As the video model resizes."""
        size = self.config.network.image_size
        return Preprocessing(image_size=size, mean=HALF, std=HALF, interpolation="bilinear", antialias=False)

    def reset(self, batch_size: int) -> None:
        """Forget the sub-goals; the next `act` is the first decision of new episodes."""
        self._decision = 0
        self._goals_BSSC: torch.Tensor | None = None

    @torch.no_grad()
    def act(self, observation: Observation) -> npt.NDArray[np.float32]:
        """-> (B, execute, A) in the environment's units."""
        config, codec = self.config.network, self.config.codec
        device = self.network.head.alpha_bars.device
        started = time.perf_counter()
        goals = self._subgoals(observation)
        planned = time.perf_counter()
        present = views(observation, self.cameras, config.image_size, antialias=False)[:, 0]
        state = state_of(observation)
        pictures = central_crop(torch.stack([present, goals], dim=1), config.crop)
        condition = self.network.condition(pictures.to(device), codec.state(state).to(device))
        encoded = time.perf_counter()
        shape = (config.diffusion.draws, config.chunk, config.action_dim)
        seed = self.config.seed
        noise = episode_noise(observation, shape, seed=seed, purpose="act", decision=self._decision)
        chunk = self.network.head.sample(condition, noise.to(device)).cpu()
        self._decision += 1
        ended = time.perf_counter()
        self.timings = {"video": planned - started, "encoder": encoded - planned, "denoiser": ended - encoded}
        return codec.decode(chunk, state)[:, : config.execute].numpy()

    def _subgoals(self, observation: Observation) -> torch.Tensor:
        """(B, S, S, 3): imagined anew when due, else as before."""
        due = self._decision * self.config.network.execute % self.config.subgoal_every == 0
        if self._goals_BSSC is None or due:
            frames = self.planner.frames(observation, decision=self._decision)
            self._goals_BSSC = torch.from_numpy(np.ascontiguousarray(frames[:, -1]))
        if len(self._goals_BSSC) != len(observation.text):
            raise InputError(
                f"batch of {len(observation.text)} after one of {len(self._goals_BSSC)}.",
                remedy="Call reset between episodes.",
            )
        return self._goals_BSSC
