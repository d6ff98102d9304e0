"""What a Video Prediction Policy is trained on: decisions of episodes, features from a cache or a frozen model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from infra.digests import sha256_json
from infra.errors import DataError, InputError
from infra.storage import absolute
from ingest.order import SampleOrder
from ingest.reader import ShardDataset
from training.callbacks.policy_validation import PolicyValidation
from training.data.episodes import ActionWindows
from training.data.loader import step_loader
from training.data.policy_windows import PolicyBatch, PolicyWindows, chosen_episodes
from training.export_policies import save_vpp
from training.feature_cache import FeatureCache, load_feature_manifest
from training.loop import Group
from training.models.common.actions import ActionCodec
from training.models.common.text import SentenceEncoder
from training.models.policies import Moments
from training.models.vpp import ActionDenoiserConfig, PolicyNetwork, VideoFormerConfig, VPPConfig
from training.models.vpp.policy import goal_vectors
from training.models.vpp.sampler import noise_levels
from training.protocols import FeatureProvider
from training.providers import build_provider, provider_digest, references

if TYPE_CHECKING:
    from training.recipes.vpp import VPPRunConfig

log = logging.getLogger(__name__)

STATISTICS_WINDOWS = 256  # decisions that channel statistics are taken from, evenly spread
CPU = torch.device("cpu")


class VPPTask:
    """Decisions into the denoiser's loss. A clip of the loop is one decision here."""

    repeats = 1

    def __init__(self, config: VPPRunConfig) -> None:
        self.config = config
        self._dataset = ShardDataset(config.data.url, split=config.data.split)
        self.cameras = tuple(config.provider.cameras) if config.provider else ()
        self._camera = self.cameras[0] if self.cameras else None
        self._episodes = chosen_episodes(config.data, self._dataset, camera=self._camera)
        self._windows = ActionWindows(
            self._episodes, chunk=config.denoiser.chunk, least=config.data.least, every=config.data.every
        )
        self.num_clips = len(self._windows)
        self.provider_digest = provider_digest(config.provider) if config.provider else ""
        sources = [self._dataset.version, *(item.digest for item in self.references)]
        self.inputs: tuple[str, ...] = tuple(sources)
        self.data_digest = sha256_json(
            [self._dataset.version, self.provider_digest, config.data.split, self.text.digest, self._cache_version]
        )
        self._provider: tuple[torch.device, FeatureProvider] | None = None
        self._rated: list[PolicyBatch] | None = None

    @property
    def references(self) -> tuple[Any, ...]:
        """The frozen models that the policy's export will name."""
        return references(self.config.provider) if self.config.provider else ()

    @cached_property
    def codec(self) -> ActionCodec:
        """Fitted to every decision of the training episodes."""
        everything = self._windows.batch(np.arange(len(self._windows)))
        return ActionCodec.fit(self.config.codec, everything.actions, everything.proprioception, everything.mask)

    def provider_on(self, device: torch.device) -> FeatureProvider:
        """Built when a feature is first computed here, where the head is; a cache makes it unnecessary."""
        if self._provider is None or self._provider[0] != device:
            self._provider = (device, build_provider(self.config.provider, device=device))
        return self._provider[1]

    @property
    def _cache_version(self) -> str:
        """What the cached features are besides the provider's: number of draws, rounding."""
        return load_feature_manifest(absolute(self.config.data.features))[1] if self.config.data.features else ""

    @cached_property
    def cache(self) -> FeatureCache | None:
        """The feature cache, checked to be of this data set and provider; in memory where it fits the budget."""
        if not self.config.data.features:
            return None
        if self.config.provider is None:
            raise InputError("data.features is given, but there is no provider.", remedy="Leave data.features empty.")
        cache = FeatureCache(self.config.data.features)
        cache.require(data_version=self._dataset.version, provider_digest=self.provider_digest)
        if cache.num_bytes <= self.config.data.memory_bytes:
            cache.preload()
        else:
            log.info(
                "feature cache %s is %.1f GB, more than data.memory_bytes: it is read from where it lies",
                *(cache.url, cache.num_bytes / 1e9),
            )
        return cache

    @cached_property
    def feature_shape(self) -> tuple[int, int, int] | None:
        """(T, N, C); None for a policy without pictures."""
        if self.config.provider is None:
            return None
        if self.cache is not None:
            return self.cache.feature_shape
        return (self._provider[1] if self._provider else self.provider_on(CPU)).feature_shape

    @cached_property
    def text(self) -> SentenceEncoder:
        """Sentences to goal vectors."""
        return SentenceEncoder(self.config.text)

    @property
    def former_config(self) -> VideoFormerConfig | None:
        """The configured Video-Former with the widths of these features."""
        if self.feature_shape is None:
            return None
        frames, _, channels = self.feature_shape
        found = {"condition_dim": channels, "num_frames": frames}
        return VideoFormerConfig.parse(self.config.former.to_json() | found)

    @property
    def denoiser_config(self) -> ActionDenoiserConfig:
        """The configured denoiser with the widths of these episodes."""
        found = {
            "num_tokens": self._num_tokens,
            "action_dim": self.codec.target_dim,
            "proprioception_dim": self.codec.state_dim if self.config.data.proprioception else 0,
            "goal_dim": self.text.dim,
            "token_dim": self.config.former.dim,
        }
        return ActionDenoiserConfig.parse(self.config.denoiser.to_json() | found)

    @property
    def _num_tokens(self) -> int:
        """What the Video-Former gives: all features where it is a linear map, none without pictures."""
        if self.feature_shape is None:
            return 0
        frames, tokens, _ = self.feature_shape
        return frames * (tokens if self.config.former.kind == "linear" else self.config.former.num_latents)

    @property
    def policy_config(self) -> VPPConfig:
        """What the export stores beside the weights."""
        return VPPConfig(
            former=self.former_config,
            denoiser=self.denoiser_config,
            sampling=self.config.sampling,
            codec=self.codec,
            text=self.config.text,
            text_digest=self.text.digest,
            provider=self.config.provider.to_json() if self.config.provider else {},
            provider_digest=self.provider_digest,
            cameras=self.cameras,
            execute=self.config.execute,
            seed=self.config.seed,
        )

    def build_model(self) -> PolicyNetwork:
        """Fresh weights from the global generator; statistics follow in `prepare`."""
        return PolicyNetwork.random(self.former_config, self.denoiser_config)

    def prepare(self, model: nn.Module) -> None:
        """Statistics of the features, where the config asks for standardised ones."""
        assert isinstance(model, PolicyNetwork)
        if self.feature_shape is None or not self.config.standardise:
            return
        device = model.feature_mean.device
        chosen = np.linspace(0, self.num_clips - 1, min(STATISTICS_WINDOWS, self.num_clips)).astype(int)
        parts = [self._features(self._view.__getitems__([(0, number)]), device) for number in chosen.tolist()]
        model.set_statistics(*Moments.of(torch.cat([part for part in parts if part is not None])))

    def batches(
        self,
        *,
        steps: range,
        global_batch_size: int,
        micro_batch_size: int,
        group: Group,
        loader_workers: int,
    ) -> Iterator[Sequence[PolicyBatch]]:
        """This rank's micro-batches of every step."""
        loader = step_loader(
            self._view,
            SampleOrder(self.num_clips, self.config.seed),
            global_batch_size=global_batch_size,
            start_step=steps.start,
            stop_step=steps.stop,
            rank=group.rank,
            world_size=group.world_size,
            num_workers=loader_workers,
        )
        for batch in loader:
            yield [batch.part(at, at + micro_batch_size) for at in range(0, len(batch), micro_batch_size)]

    def loss(self, model: nn.Module, batch: PolicyBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """The denoiser's loss at the batch's own draws."""
        assert isinstance(model, PolicyNetwork)
        features = self._features(batch, device)
        tokens = model.tokens(None if features is None else features.to(device), len(batch))
        return {"loss": model.denoiser.loss(tokens, **self._arguments(model, batch, device))}

    def example(self, num_clips: int) -> PolicyBatch:
        """Shapes only."""
        batch = PolicyWindows(
            self._dataset, self._episodes, self._windows, codec=self.codec, goals_EG=self._goals, seed=0
        ).__getitems__([(0, 0)] * num_clips)
        meta = {name: value.to("meta") for name, value in batch.tensors().items()}
        if self.feature_shape is not None:
            meta["features"] = torch.empty(num_clips, *self.feature_shape, device="meta")
        return PolicyBatch(**meta)

    def batch_tensors(self, batch: PolicyBatch) -> dict[str, torch.Tensor]:
        """Everything in the batch that is a tensor."""
        return batch.tensors()

    def validation(self) -> PolicyValidation | None:
        """The callback on held-out decisions; None where the data set holds none."""
        split = self.config.data.validation_split
        if not self.config.validation.every_steps or split is None or not self._held_out:
            return None
        return PolicyValidation(self.config.validation, self.rate)

    @torch.no_grad()
    def rate(self, model: nn.Module) -> dict[str, float]:
        """Fixed-draw loss and mean squared error of sampled chunks, over the held-out decisions."""
        assert isinstance(model, PolicyNetwork)
        device = model.feature_mean.device
        found: dict[str, list[float]] = {"loss": [], "action_mse": []}
        for batch in self._held_out_on(device):
            features = batch.features
            tokens = model.tokens(None if features is None else features.to(device), len(batch))
            arguments = self._arguments(model, batch, device)
            loss = float(model.denoiser.loss(tokens, **arguments))
            sampled = model.denoiser.sample(
                tokens,
                arguments["goal"],
                proprioception=arguments["proprioception"],
                unit_noise=arguments["noise"],
                sigmas=noise_levels(self.config.sampling).to(device),
                sampler=self.config.sampling.sampler,
            )
            errors_BK = (sampled.cpu() - batch.targets).square().mean(dim=-1) * batch.mask
            found["loss"].append(loss * len(batch))
            found["action_mse"].append(float((errors_BK.sum(dim=1) / batch.mask.sum(dim=1)).sum()))
        count = sum(len(batch) for batch in self._held_out)
        return {name: sum(values) / count for name, values in found.items()}

    def export(self, folder: str, model: nn.Module, *, summary: dict[str, Any]) -> str:
        """Publish the head; the frozen video model is named by digest."""
        assert isinstance(model, PolicyNetwork)
        if self._held_out:
            summary |= {f"validation_{name}": value for name, value in self.rate(model.eval()).items()}
        facts = {
            "data set": self._dataset.version,
            "episodes": len(self._episodes),
            "decisions": self.num_clips,
            "features": self.config.provider.kind if self.config.provider else "none: proprioception and sentence",
            "provider": self.provider_digest or "none",
            "steps": summary["steps"],
            "loss, mean of the last 50 steps": f"{summary['last'].get('loss', float('nan')):.5f}",
            "validation action error": f"{summary.get('validation_action_mse', float('nan')):.5f}",
            "config": self.config.identity_digest(),
        }
        return save_vpp(folder, model, self.policy_config, references=self.references, facts=facts, inputs=self.inputs)

    @cached_property
    def _goals(self) -> torch.Tensor:
        """(episodes, G)."""
        return goal_vectors(self.text, [episode.text for episode in self._episodes])

    @cached_property
    def _view(self) -> PolicyWindows:
        return PolicyWindows(
            self._dataset,
            self._episodes,
            self._windows,
            codec=self.codec,
            goals_EG=self._goals,
            seed=self.config.seed,
            cameras=self.cameras,
            cache=self.cache,
        )

    @cached_property
    def _held_out(self) -> list[PolicyBatch]:
        """Held-out decisions in batches, always the same ones with the same draws."""
        config = self.config
        if config.data.validation_split is None:
            return []
        dataset = ShardDataset(config.data.url, split=config.data.validation_split)
        if not len(dataset):
            return []
        episodes = chosen_episodes(config.data.model_copy(update={"share": 1.0}), dataset, camera=self._camera)
        try:
            windows = ActionWindows(episodes, chunk=config.denoiser.chunk, least=config.data.least)
        except DataError:  # too short to hold a single decision
            return []
        goals = goal_vectors(self.text, [episode.text for episode in episodes])
        view = PolicyWindows(
            dataset, episodes, windows, codec=self.codec, goals_EG=goals, seed=config.seed, cameras=self.cameras
        )
        count = min(config.validation.decisions, len(windows))
        chosen = np.linspace(0, len(windows) - 1, count).astype(int).tolist()
        size = config.validation.batch_size
        parts = [chosen[at : at + size] for at in range(0, count, size)]
        return [view.__getitems__([(0, number) for number in part]) for part in parts]

    def _held_out_on(self, device: torch.device) -> list[PolicyBatch]:
        """The held-out decisions with their features, computed once and not at every look."""
        if self._rated is None:
            self._rated = [
                replace(batch, images=None, features=self._features(batch, device)) for batch in self._held_out
            ]
        return self._rated

    def _features(self, batch: PolicyBatch, device: torch.device) -> torch.Tensor | None:
        if batch.features is not None:
            return batch.features
        if batch.images is None:
            return None
        views = {camera: batch.images[:, place].numpy() for place, camera in enumerate(self.cameras)}
        return self.provider_on(device).features(views, batch.texts)

    def _arguments(self, model: PolicyNetwork, batch: PolicyBatch, device: torch.device) -> dict[str, Any]:
        weights = self.config.loss_weights
        return {
            "goal": batch.goals[:, None].to(device),
            "actions": batch.targets.to(device),
            "proprioception": batch.state[:, None].to(device) if self.config.data.proprioception else None,
            "sigma": model.denoiser.sigma_from_uniform(batch.sigma_uniform).to(device),
            "noise": batch.noise.to(device),
            "mask": batch.mask.to(device),
            "weights": torch.tensor(weights, device=device) if weights else None,
        }
