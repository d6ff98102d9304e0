"""Uni-Pi style policy: imagine the video of the task, then act what lies between its frames.

Du 2023 (arXiv 2302.00111) with the project's video model in the place of theirs. Shape letters: B environments, T
frames of a plan, S the video model's side, M pairs, K actions of a pair, A action.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch

from infra.errors import InputError
from training.models.common.images import Preprocessing
from training.models.common.pictures import state_of
from training.models.common.planning import Planner
from training.models.inverse_dynamics.config import StoredUniPiPolicy
from training.models.inverse_dynamics.model import InverseDynamicsNetwork
from training.protocols import Observation, VideoPredictor

HALF = (0.5, 0.5, 0.5)


class UniPiPolicy:
    """Plans anew every `execute` steps. Deterministic for equal observations, keys and decision numbers.

    `noise_shape` is (T, C, h, w) of the video model's latents. `InputError` when the model's frames do not fit.
    """

    needs_images = True

    def __init__(
        self,
        network: InverseDynamicsNetwork,
        video: VideoPredictor,
        config: StoredUniPiPolicy,
        *,
        noise_shape: tuple[int, int, int, int],
        digest: str = "",
    ) -> None:
        if video.image_size != config.network.image_size:
            raise InputError(
                f"inverse dynamics of {config.network.image_size} pixels on frames of {video.image_size}.",
                remedy="Train it at the video model's size.",
            )
        if config.pairs > video.num_frames - 1:
            raise InputError(
                f"execute {config.execute} needs {config.pairs} pairs, a plan of {video.num_frames} frames has fewer.",
                remedy="Execute fewer actions.",
            )
        self.network = network.eval().requires_grad_(False)
        self.planner = Planner(video, config.plan, camera=config.camera, noise_shape=noise_shape)
        self.config = config
        self.digest = digest
        self.cameras = (config.camera,)
        self.action_horizon = config.execute
        self.timings: dict[str, float] = {}
        self.reset(0)

    @property
    def preprocessing(self) -> Preprocessing:
        """As the video model resizes."""
        size = self.config.network.image_size
        return Preprocessing(image_size=size, mean=HALF, std=HALF, interpolation="bilinear", antialias=False)

    def reset(self, batch_size: int) -> None:
        """The next `act` is the first decision of new episodes."""
        self._decision = 0

    @torch.no_grad()
    def act(self, observation: Observation) -> npt.NDArray[np.float32]:
        """-> (B, execute, A) in the environment's units."""
        codec, pairs = self.config.codec, self.config.pairs
        started = time.perf_counter()
        frames_BTSSC = torch.from_numpy(self.planner.frames(observation, decision=self._decision))
        planned = time.perf_counter()
        state = state_of(observation)
        frames_BM2SSC = torch.stack([frames_BTSSC[:, :pairs], frames_BTSSC[:, 1 : pairs + 1]], dim=2)
        felt = codec.state(state).repeat_interleave(pairs, dim=0) if self.config.network.proprioception_dim else None
        device = self.network.perceptron.out.weight.device
        normalised = self.network(frames_BM2SSC.flatten(0, 1).to(device), None if felt is None else felt.to(device))
        chunk_BKD = normalised.float().cpu().unflatten(0, (len(state), pairs)).flatten(1, 2)
        self._decision += 1
        self.timings = {"video": planned - started, "inverse_dynamics": time.perf_counter() - planned}
        return codec.decode(chunk_BKD, state)[:, : self.config.execute].numpy()
