"""Plans of a frozen video model for policies that act on what it imagines.

Shape letters: B environments, T frames, C latent channels, h, w latents, S the video model's side.
"""

from __future__ import annotations

from pydantic import Field

from infra.config import Config
from infra.errors import InputError
from training.models.common.pictures import episode_noise
from training.protocols import Images, Observation, VideoPredictor


class PlanConfig(Config):
    """How a plan is sampled. `stride` is the number of control steps between two frames that the model was taught."""

    num_steps: int = Field(default=30, ge=1)
    guidance: tuple[float, float] = (1.0, 3.0)
    stride: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0)


class Planner:
    """First picture and sentence -> imagined frames. A plan's noise belongs to its episode and decision.

    `noise_shape` is (T, C, h, w) of the video model's latents.
    """

    def __init__(
        self, video: VideoPredictor, config: PlanConfig, *, camera: str, noise_shape: tuple[int, int, int, int]
    ) -> None:
        if noise_shape[0] != video.num_frames:
            raise InputError(
                f"noise {noise_shape} for a video model of {video.num_frames} frames.", remedy="Take its T."
            )
        self.video = video
        self.config = config
        self.camera = camera
        self.noise_shape = noise_shape

    def frames(self, observation: Observation, *, decision: int) -> Images:
        """(B, T, S, S, 3) uint8; frame 0 is the model's view of the present."""
        if self.camera not in observation.images:
            raise InputError(
                f"the video model needs camera {self.camera!r}, the observation has {sorted(observation.images)}.",
                remedy="Render that camera.",
            )
        seed = self.config.seed
        noise = episode_noise(observation, self.noise_shape, seed=seed, purpose="plan", decision=decision)
        return self.video.predict(
            observation.images[self.camera],
            observation.text,
            num_steps=self.config.num_steps,
            guidance=self.config.guidance,
            unit_noise=noise,
        )
