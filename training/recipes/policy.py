"""Behaviour cloning of robot episodes on frozen features.

    foreframe train-policy --preset tiny          under a minute on one CPU core after the features
    foreframe train-policy --preset cortexbench   the VC-1 protocol's head: 3 pictures, FLARE, batch norm, 100 epochs

The control arms are providers of the same recipe: an encoder of random weights, and no pictures at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from infra.compute import ComputeConfig
from infra.config import Config
from infra.digests import sha256_json
from ingest.order import SampleOrder, rank_span
from ingest.reader import ShardDataset, Split
from training.checkpoint import CheckpointConfig
from training.data.episodes import ActionWindows, WindowBatch, load_episodes
from training.export import load_encoder, model_card, random_encoder, save_export
from training.features import EpisodeFeatures, compute_features
from training.loop import Group, Precision
from training.models.common.frozen import FeatureKind, FrozenEncoder
from training.models.common.text import SentenceEncoder
from training.models.policies import (
    BehaviourCloningConfig,
    BehaviourCloningHead,
    BehaviourCloningPolicy,
    Moments,
)
from training.optim import OptimConfig, ScheduleConfig
from training.session import RunConfig


class ProviderConfig(Config):
    """Where the frozen features come from. `random` has the sizes of the export at `url` and weights of `seed`."""

    kind: Literal["export", "random", "none"] = "export"
    url: str = ""
    seed: int = Field(default=0, ge=0)
    feature: FeatureKind = "class_token"

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if (self.kind == "none") != (self.url == ""):
            raise ValueError(f"provider {self.kind!r} and url {self.url!r} do not go together: only 'none' has no url")
        return self

    def build(self) -> FrozenEncoder | None:
        """The encoder, None for proprioception alone."""
        if self.kind == "none":
            return None
        return load_encoder(self.url) if self.kind == "export" else random_encoder(self.url, seed=self.seed)


class EpisodesConfig(Config):
    """Which episodes."""

    url: str
    split: Split | None = "train"
    camera: str | None = None


class PolicyConfig(RunConfig):
    """A whole policy run. Widths that the encoder and the data decide are filled into `head` when it is built."""

    kind: Literal["train-policy"] = "train-policy"
    provider: ProviderConfig
    data: EpisodesConfig
    head: BehaviourCloningConfig = BehaviourCloningConfig(feature="none")
    optim: OptimConfig = OptimConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4)
    schedule: ScheduleConfig = ScheduleConfig(epochs=None, warmup_epochs=0, steps=1500)
    global_batch_size: int = Field(default=128, gt=0)
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _head_is_open(self) -> Self:
        if self.head.feature != "none":
            raise ValueError("head.feature is decided by provider.feature; leave it 'none'")
        return self

    def build_task(self) -> PolicyTask:
        """Open the episodes and the encoder; features are computed when they are first needed."""
        return PolicyTask(self)


def tiny(*, provider: ProviderConfig, data: str, output: str) -> PolicyConfig:
    """Chunks of 8 actions of which 4 are carried out, one picture and a sentence; 2,500 steps of 128 windows."""
    return PolicyConfig(
        output=output,
        provider=provider,
        data=EpisodesConfig(url=data),
        head=BehaviourCloningConfig(feature="none", hidden=(512, 512, 512)),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01),
        schedule=ScheduleConfig(epochs=None, warmup_epochs=0, steps=2500),
        log_every_steps=25,
        checkpoint=CheckpointConfig(every_steps=500),
        # Seconds of training: a group of workers would take longer to start than to train.
        compute=ComputeConfig(workers=0),
    )


def cortexbench(*, provider: ProviderConfig, data: str, output: str) -> PolicyConfig:
    """The head and optimiser of CortexBench (VC-1, 2023); its data sets have about 25 episodes a task."""
    return PolicyConfig(
        output=output,
        provider=provider,
        data=EpisodesConfig(url=data),
        head=BehaviourCloningConfig(
            feature="none",
            history=3,
            fusion="flare",
            standardise=False,
            batch_norm=True,
            loss="mse",
            chunk=1,
            execute=1,
            text_dim=0,
        ),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=ScheduleConfig(epochs=100, warmup_epochs=0, shape="constant"),
        global_batch_size=256,
        checkpoint=CheckpointConfig(every_steps=500),
        compute=ComputeConfig(workers=1),
    )


@dataclass(frozen=True)
class CloningBatch:
    """B windows with what the head sees of them."""

    windows: WindowBatch
    features: torch.Tensor | None  # (B, T, D) or (B, T, N, D)
    text: torch.Tensor | None  # (B, E)

    def __len__(self) -> int:
        return len(self.windows)


class PolicyTask:
    """Windows of episodes into the cloning loss. A clip of the loop is one window here."""

    repeats = 1

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self._dataset = ShardDataset(config.data.url, split=config.data.split)
        self._episodes = load_episodes(self._dataset, camera=config.data.camera)
        self._windows = ActionWindows(self._episodes, chunk=config.head.chunk)
        self._encoder = config.provider.build()
        self.num_clips = len(self._windows)
        encoder_inputs = (self._encoder.digest,) if self._encoder else ()
        self.inputs: tuple[str, ...] = (self._dataset.version, *encoder_inputs)
        self.data_digest = sha256_json([*self.inputs, config.data.split])

    @property
    def head_config(self) -> BehaviourCloningConfig:
        """The configured head with the widths of this encoder and these episodes."""
        episode = self._episodes[0]
        found: dict[str, Any] = {
            "action_dim": episode.actions.shape[1],
            "proprioception_dim": episode.proprioception.shape[1],
        }
        if self._encoder is not None:
            tokens = self._encoder.config.num_patches if self.config.provider.feature == "patch_tokens" else 0
            found |= {
                "feature": self.config.provider.feature,
                "feature_dim": self._encoder.embed_dim,
                "num_tokens": tokens,
            }
        return BehaviourCloningConfig.parse(self.config.head.to_json() | found)

    def build_model(self) -> BehaviourCloningHead:
        """Fresh weights from the global generator; statistics follow in `prepare`."""
        return BehaviourCloningHead(self.head_config)

    def prepare(self, model: nn.Module) -> None:
        """Standardisation over all frames and actions of the training episodes."""
        assert isinstance(model, BehaviourCloningHead)
        model.set_statistics(
            features=Moments.of(self._features.rows) if self._features else None,
            proprioception=Moments.of(torch.cat([torch.from_numpy(e.proprioception) for e in self._episodes])),
            actions=Moments.of(torch.cat([torch.from_numpy(e.actions) for e in self._episodes])),
        )

    def batches(
        self,
        *,
        steps: range,
        global_batch_size: int,
        micro_batch_size: int,
        group: Group,
        loader_workers: int,
    ) -> Iterator[Sequence[CloningBatch]]:
        """This rank's micro-batches of every step; all of it is in memory, so there are no loader processes."""
        order = SampleOrder(self.num_clips, self.config.seed)
        for step in steps:
            start, stop = rank_span(step, global_batch_size, group.rank, group.world_size)
            spans = [(at, min(at + micro_batch_size, stop)) for at in range(start, stop, micro_batch_size)]
            yield [self._batch(order.slice(*span)[1]) for span in spans]

    def loss(self, model: nn.Module, batch: CloningBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """The head's loss, a mean over the actions that exist."""
        features, text = (None if part is None else part.to(device) for part in (batch.features, batch.text))
        windows = batch.windows
        proprioception, actions, mask = (
            part.to(device) for part in (windows.proprioception, windows.actions, windows.mask)
        )
        assert isinstance(model, BehaviourCloningHead)
        return {"loss": model.loss(features, proprioception, text, actions, mask)}

    def example(self, num_clips: int) -> CloningBatch:
        """Shapes only."""
        head = self.head_config
        windows = self._windows.batch([0] * num_clips)
        fields = {field.name: getattr(windows, field.name).to("meta") for field in dataclasses.fields(windows)}
        tokens = (head.num_tokens,) if head.feature == "patch_tokens" else ()
        shape = (num_clips, head.history, *tokens, head.feature_dim)
        return CloningBatch(
            windows=type(windows)(**fields),
            features=torch.empty(shape, device="meta") if head.uses_images else None,
            text=torch.empty(num_clips, head.text_dim, device="meta") if head.text_dim else None,
        )

    def batch_tensors(self, batch: CloningBatch) -> dict[str, torch.Tensor]:
        """The windows and, where there are any, their features."""
        tensors = {field.name: getattr(batch.windows, field.name) for field in dataclasses.fields(batch.windows)}
        return tensors | ({} if batch.features is None else {"features": batch.features})

    def export(self, folder: str, model: nn.Module, *, summary: dict[str, Any]) -> str:
        """Publish head and encoder together."""
        assert isinstance(model, BehaviourCloningHead)
        camera = self.config.data.camera or next(iter(self._dataset.record(0).cameras))
        policy = BehaviourCloningPolicy(model, encoder=self._encoder, camera=camera)
        facts = {
            "data set": self._dataset.version,
            "episodes": len(self._episodes),
            "features": f"{self.config.provider.kind}, {self.head_config.feature}",
            "encoder": self._encoder.digest if self._encoder else "none",
            "steps": summary["steps"],
            "loss, mean of the last 50 steps": f"{summary['last'].get('loss', float('nan')):.5f}",
            "config": self.config.identity_digest(),
        }
        return save_export(
            folder,
            kind="bc-policy",
            model_config=policy.config,
            weights=policy.weights(),
            preprocessing=policy.preprocessing,
            card=model_card(
                "Behaviour-cloning policy",
                summary="Action chunks from frozen image features, proprioception and a sentence.",
                facts=facts,
                limits="A training loss says nothing about success: see the roll-outs that name this export's digest. "
                "It expects the camera, the control rate and the robot of its training episodes.",
            ),
            inputs=self.inputs,
        )

    @cached_property
    def _features(self) -> EpisodeFeatures | None:
        if self._encoder is None:
            return None
        return compute_features(
            self._dataset,
            self._episodes,
            self._encoder,
            kind=self.config.provider.feature,
            camera=self.config.data.camera,
            dtype=torch.float16 if self.config.provider.feature == "patch_tokens" else torch.float32,
        )

    @cached_property
    def _text(self) -> torch.Tensor | None:
        """(episodes, E) sentence vectors."""
        if not self.config.head.text_dim:
            return None
        return SentenceEncoder().encode([episode.text for episode in self._episodes])

    def _batch(self, numbers: Any) -> CloningBatch:
        windows = self._windows.batch(numbers)
        offsets = self.config.head.history_offsets
        features = self._features.windows(windows, offsets) if self._features else None
        text = None if self._text is None else self._text[windows.episodes]
        return CloningBatch(windows, features, text)
