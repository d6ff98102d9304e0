"""The Video Prediction Policy in closed loop: pictures -> predictive features -> tokens -> a denoised action chunk.

VPP (arXiv 2412.14803) stage 2. Shape letters: B environments, T frames, N tokens of a frame, C channels, Q tokens,
G goal width, P proprioception, K chunk, D action target, A action.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import nn

from infra.config import Config
from infra.errors import InputError
from training.models.common.actions import ActionCodec
from training.models.common.text import SentenceEncoder, SentenceEncoderConfig
from training.models.vpp.config import ActionDenoiserConfig, SamplingConfig, VideoFormerConfig
from training.models.vpp.denoiser import ActionDenoiser
from training.models.vpp.former import VideoFormer
from training.models.vpp.sampler import noise_levels, num_step_draws
from training.protocols import FeatureProvider, Observation
from training.state import counter_seed


class VPPConfig(Config):
    """All a stored policy needs besides its weights.

    `provider` is the config of the frozen feature provider, which the export names and does not hold; empty for a
    policy without pictures, whose `former` is None. `execute` actions of each chunk are carried out.
    """

    former: VideoFormerConfig | None
    denoiser: ActionDenoiserConfig
    sampling: SamplingConfig = SamplingConfig()
    codec: ActionCodec
    text: SentenceEncoderConfig = SentenceEncoderConfig()
    text_digest: str = ""  # of the sentence encoder's files
    provider: dict[str, Any] = Field(default_factory=dict)
    provider_digest: str = ""
    cameras: tuple[str, ...] = ()
    execute: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if (self.former is None) != (not self.cameras):
            raise ValueError(f"former {self.former} does not go with cameras {self.cameras}")
        if self.execute > self.denoiser.chunk:
            raise ValueError(f"execute {self.execute} exceeds the chunk of {self.denoiser.chunk} actions")
        return self


class PolicyNetwork(nn.Module):
    """What stage 2 trains: Video-Former and action denoiser, with the features' statistics as buffers."""

    def __init__(self, former: VideoFormer | None, denoiser: ActionDenoiser) -> None:
        super().__init__()
        self.former = former
        self.denoiser = denoiser
        channels = former.config.condition_dim if former else 0
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_std", torch.ones(channels))

    @classmethod
    def random(cls, former: VideoFormerConfig | None, denoiser: ActionDenoiserConfig) -> Self:
        """Fresh weights from torch's generator."""
        return cls(VideoFormer(former) if former else None, ActionDenoiser(denoiser))

    def set_statistics(self, mean_C: torch.Tensor, std_C: torch.Tensor) -> None:
        """Standardise features per channel from now on; the release does not (mean 0, deviation 1)."""
        self.feature_mean.copy_(mean_C)
        self.feature_std.copy_(std_C)

    def tokens(self, features_BTNC: torch.Tensor | None, num_clips: int) -> torch.Tensor:
        """(B, Q, dim); no token at all for a policy without pictures."""
        if self.former is None:
            return self.feature_mean.new_zeros(num_clips, 0, self.denoiser.config.token_dim)
        assert features_BTNC is not None, "a policy with a Video-Former needs features"
        return self.former((features_BTNC.float() - self.feature_mean) / self.feature_std)


class VideoPredictionPolicy:
    """Deterministic for equal observations, keys and decision numbers; `unit_noise` replaces the keyed draw."""

    def __init__(
        self,
        provider: FeatureProvider | None,
        former: VideoFormer | None,
        denoiser: ActionDenoiser,
        action_codec: ActionCodec,
        *,
        config: VPPConfig | None = None,
        network: PolicyNetwork | None = None,
        text: SentenceEncoder | None = None,
        digest: str = "",
    ) -> None:
        if (provider is None) != (former is None):
            raise InputError("a Video-Former needs a feature provider, and the other way round.", remedy="Give both.")
        self.network = (network or PolicyNetwork(former, denoiser)).eval().requires_grad_(False)
        self.config = config or VPPConfig(
            former=former.config if former else None,
            denoiser=denoiser.config,
            codec=action_codec,
            provider_digest=provider.digest if provider else "",
            cameras=provider.cameras if provider else (),
            execute=denoiser.config.chunk,
        )
        self.provider = provider
        self.codec = action_codec
        self.text = text or SentenceEncoder(self.config.text)
        self.digest = digest
        self.needs_images = provider is not None
        self.cameras = self.config.cameras
        self.action_horizon = self.config.execute
        self.timings: dict[str, float] = {}
        self._decision = 0
        self._sigmas = noise_levels(self.config.sampling)

    def to(self, device: str | torch.device) -> Self:
        """Move the head's weights; the provider stays where it was built."""
        self.network.to(device)
        return self

    def reset(self, batch_size: int = 1) -> None:
        """The next `act` is the first decision of new episodes."""
        self._decision = 0

    @torch.no_grad()
    def act(self, observation: Observation, *, unit_noise: torch.Tensor | None = None) -> npt.NDArray[np.float32]:
        """-> (B, execute, A) in the environment's units. `unit_noise` is (B, K, D) standard normal."""
        network, device = self.network, self.network.feature_mean.device
        num_clips = len(observation.text)
        self.timings = {}
        with self._timed("features"):
            features = self._features(observation)
        with self._timed("video_former"):
            tokens = network.tokens(None if features is None else features.to(device), num_clips)
        with self._timed("action_denoiser"):
            state = torch.from_numpy(np.array(observation.proprioception, np.float32))
            start, steps = self._noise(observation.keys, num_clips)
            uses_state = self.config.denoiser.proprioception_dim > 0
            normalised = network.denoiser.sample(
                tokens,
                goal_vectors(self.text, observation.text)[:, None].to(device),
                proprioception=self.codec.state(state)[:, None].to(device) if uses_state else None,
                unit_noise=(start if unit_noise is None else unit_noise).to(device),
                step_noise=steps.to(device),
                sigmas=self._sigmas.to(device),
                sampler=self.config.sampling.sampler,
            )
        self._decision += 1
        chunk = self.codec.decode(normalised.float().cpu(), state)
        actions: npt.NDArray[np.float32] = chunk[:, : self.action_horizon].numpy()
        return actions

    def _features(self, observation: Observation) -> torch.Tensor | None:
        if self.provider is None:
            return None
        missing = sorted(set(self.cameras) - set(observation.images))
        if missing:
            raise InputError(
                f"the policy needs camera {', '.join(missing)}, the observation has {sorted(observation.images)}.",
                remedy="Render that camera.",
            )
        images = {camera: observation.images[camera] for camera in self.cameras}
        return self.provider.features(images, observation.text)

    def _noise(self, keys: Sequence[str], num_clips: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, K, D) and, for samplers that draw on the way, (R, B, K, D).

        One stream an episode and decision: a rollout does not depend on its neighbours in the batch.
        """
        sampling = self.config.sampling
        draws = 1 + num_step_draws(sampling.sampler, sampling.num_steps)
        shape = (draws, self.config.denoiser.chunk, self.config.denoiser.action_dim)
        names = keys or [str(place) for place in range(num_clips)]
        seeds = [counter_seed(self.config.seed, "act", name, self._decision) for name in names]
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noise = torch.stack(drawn, dim=1)
        return noise[0], noise[1:]

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings[part] = time.perf_counter() - started


def goal_vectors(text: SentenceEncoder, sentences: Sequence[str]) -> torch.Tensor:
    """(B, G) sentence vectors with about unit deviation per channel, as CLIP's raw projections have it."""
    vectors = text.encode(sentences)
    return vectors * math.sqrt(vectors.shape[-1]) if text.config.kind == "minilm" else vectors


def network_of(config: VPPConfig, weights: Mapping[str, torch.Tensor]) -> PolicyNetwork:
    """The trained network of an export, on the CPU."""
    from training.models.common.weights import load_weights

    network = PolicyNetwork.random(config.former, config.denoiser)
    load_weights(network, weights)
    return network
