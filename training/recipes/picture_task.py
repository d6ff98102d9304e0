"""What the recipes that learn from pixels share: episodes, windows, statistics, batches. The model is theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from infra.digests import sha256_json
from ingest.order import SampleOrder
from ingest.reader import ShardDataset
from training.data.episodes import ActionWindows, load_episodes
from training.data.loader import step_loader
from training.data.picture_windows import (
    EpisodePictures,
    PictureBatch,
    PictureDataConfig,
    PictureWindows,
    WindowPlan,
)
from training.loop import Group, Precision
from training.models.common.actions import ActionCodec, CodecConfig
from training.models.common.text import TEXT_DIM, SentenceEncoder
from training.session import RunConfig

# Smallest and largest value of every dimension become -1 and 1, as in Diffusion Policy: its samples are clipped there.
BOUNDS = CodecConfig(scaling="bounds", percentiles=(0.0, 100.0))
POLICY_LIMITS = (
    "A training loss says nothing about success: see the rollouts that name this export's digest. It expects the "
    "camera, the control rate and the robot of its training episodes."
)


class PictureRunConfig(RunConfig):
    """What every such run has. `codec` is fitted to the training episodes; without `proprioception` it only sees."""

    data: PictureDataConfig
    codec: CodecConfig = BOUNDS
    proprioception: bool = True
    global_batch_size: int = Field(default=64, gt=0)
    precision: Precision = "float32"


class PictureTask:
    """Windows of episodes with their pictures. A clip of the loop is one window here.

    `complete` leaves out windows that reach beyond their episode; else its last frame stands in, or its first.
    """

    repeats = 1

    def __init__(
        self,
        config: PictureRunConfig,
        *,
        plan: WindowPlan,
        chunk: int,
        antialias: bool,
        complete: bool = False,
        hears: bool = False,
        models: Sequence[str] = (),
    ) -> None:
        self.config, self.plan = config, plan
        self._antialias, self._hears = antialias, hears
        self.dataset = ShardDataset(config.data.url, split=config.data.split)
        self.episodes = load_episodes(self.dataset, camera=config.data.cameras[0])
        self._windows = ActionWindows(self.episodes, chunk=chunk, least=chunk if complete else 1)
        everything = self._windows.batch(np.arange(len(self._windows)))
        lengths = np.array([episode.num_frames for episode in self.episodes])
        reach = max(most for _, most in plan.spans) if complete else 0
        fits = everything.frames.numpy() + reach < lengths[everything.episodes.numpy()]
        self._numbers = np.flatnonzero(fits)
        self.codec = ActionCodec.fit(config.codec, everything.actions, everything.proprioception, everything.mask)
        self.num_clips = len(self._numbers)
        self.inputs: tuple[str, ...] = (self.dataset.version, *models)
        self.data_digest = sha256_json([*self.inputs, config.data.split])

    @property
    def widths(self) -> dict[str, int]:
        """Widths that the data decide."""
        felt = self.codec.state_dim if self.config.proprioception else 0
        return {"action_dim": self.codec.target_dim, "proprioception_dim": felt}

    def prepare(self, model: nn.Module) -> None:
        """Nothing: statistics are in the codec."""

    @cached_property
    def stores(self) -> tuple[EpisodePictures, ...]:
        """One store of pictures for each span; equal ones by default."""
        return (self.pictures(),) * len(self.plan.spans)

    def pictures(self, through: Any = None) -> EpisodePictures:
        """Every frame at the plan's size, passed `through` something once."""
        return EpisodePictures(
            self.dataset,
            self.episodes,
            cameras=self.config.data.cameras,
            size=self.plan.size,
            antialias=self._antialias,
            memory_bytes=self.config.data.memory_bytes,
            through=through,
        )

    def batches(
        self, *, steps: range, global_batch_size: int, micro_batch_size: int, group: Group, loader_workers: int
    ) -> Iterator[Sequence[PictureBatch]]:
        """This rank's micro-batches of every step. Loader processes only serve pictures that are not in memory."""
        for store in self.stores:
            store.load()
        text = torch.zeros(len(self.episodes), 0)
        if self._hears:
            text = SentenceEncoder().encode([episode.text for episode in self.episodes])
        view = PictureWindows(
            self.episodes,
            self._windows,
            self._numbers,
            pictures=self.stores,
            plan=self.plan,
            codec=self.codec,
            text_EG=text,
            seed=self.config.seed,
        )
        loader = step_loader(
            view,
            SampleOrder(self.num_clips, self.config.seed),
            global_batch_size=global_batch_size,
            start_step=steps.start,
            stop_step=steps.stop,
            rank=group.rank,
            world_size=group.world_size,
            num_workers=0 if all(store.in_memory for store in self.stores) else loader_workers,
        )
        for batch in loader:
            starts = range(0, len(batch), micro_batch_size)
            yield [batch.part(start, min(start + micro_batch_size, len(batch))) for start in starts]

    def example(self, num_clips: int) -> PictureBatch:
        """Shapes only."""
        plan, chunk = self.plan, (num_clips, self._windows.chunk)
        side, spans = plan.crop or plan.size, len(plan.spans)
        diffuses = plan.train_steps > 0
        targets = torch.empty(*chunk, self.codec.target_dim, device="meta")
        return PictureBatch(
            images=torch.empty(
                num_clips, len(self.config.data.cameras), spans, side, side, 3, dtype=torch.uint8, device="meta"
            ),
            states=torch.empty(num_clips, spans, self.codec.state_dim, device="meta"),
            targets=targets,
            mask=torch.empty(chunk, dtype=torch.bool, device="meta"),
            text=torch.empty(num_clips, TEXT_DIM if self._hears else 0, device="meta"),
            steps=torch.empty(num_clips, dtype=torch.int64, device="meta") if diffuses else None,
            noise=torch.empty_like(targets) if diffuses else None,
        )

    def batch_tensors(self, batch: PictureBatch) -> dict[str, torch.Tensor]:
        """The whole batch."""
        return batch.tensors()

    def facts(self, summary: dict[str, Any]) -> dict[str, object]:
        """Rows of the model card that every such policy has."""
        return {
            "data set": self.dataset.version,
            "episodes": len(self.episodes),
            "windows": self.num_clips,
            "cameras": ", ".join(self.config.data.cameras),
            "steps": summary["steps"],
            "loss, mean of the last 50 steps": f"{summary['last'].get('loss', float('nan')):.5f}",
            "config": self.config.identity_digest(),
        }
