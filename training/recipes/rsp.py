"""Pre-training of an image encoder by stochastic frame prediction (RSP, ICML 2024).

    foreframe pretrain --preset tiny      400 steps of 16 videos: two minutes on two CPU cores
    foreframe pretrain --preset vits16    the papers' run: Kinetics-400, 31,250 steps of 1,536 videos, a GPU cluster

`tiny` is the papers' recipe with smaller sizes and counts and nothing else. The learning rate is among them only
through `optim.lr_batch_size`: the rule (1.5e-4 per 256 videos) stays, but is evaluated at the papers' batch, because
at 16 videos it would give 9.4e-6 and nothing would be learnt in a few hundred steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from infra.compute import ComputeConfig
from infra.storage import join, write_bytes
from ingest.order import SampleOrder, rank_span
from training.checkpoint import CheckpointConfig
from training.data.frame_pairs import FramePairConfig, FramePairDataset
from training.data.loader import step_loader
from training.data.pixels import normalise
from training.export import model_card, save_export
from training.loop import Group
from training.models.common.images import Preprocessing
from training.models.rsp import RSP, RSPConfig, RSPDraws
from training.optim import OptimConfig, ScheduleConfig
from training.recipes.rsp_pictures import PICTURES_NAME, predicted_futures
from training.session import RunConfig
from training.state import counter_seed

PAPER_BATCH_SIZE = 1536  # videos; two pairs are drawn from each

# Dotted keys in which a preset may differ from the papers': sizes, counts, and where it runs.
SIZES_AND_COUNTS = (
    "model.image_size",
    "model.embed_dim",
    "model.depth",
    "model.num_heads",
    "model.decoder_embed_dim",
    "model.decoder_depth",
    "model.decoder_num_heads",
    "model.num_latents",
    "model.num_classes",
    "data.image_size",
    "schedule.epochs",
    "schedule.warmup_epochs",
    "schedule.steps",
    "schedule.warmup_steps",
    "global_batch_size",
    "micro_batch_size",
    "optim.lr_batch_size",
    "log_every_steps",
    "checkpoint.every_steps",
    "compute",
)


class PretrainConfig(RunConfig):
    """A whole RSP run. `data.seed` 0 follows the run's seed."""

    kind: Literal["pretrain-rsp"] = "pretrain-rsp"
    model: RSPConfig = RSPConfig()
    data: FramePairConfig
    global_batch_size: int = Field(default=PAPER_BATCH_SIZE, gt=0)

    @model_validator(mode="after")
    def _one_image_size(self) -> Self:
        if self.data.image_size != self.model.image_size:
            raise ValueError(f"data.image_size {self.data.image_size} is not model.image_size {self.model.image_size}")
        return self

    def build_task(self) -> RSPTask:
        """Open the data set; the model is built later."""
        return RSPTask(self)


def vits16(*, data: str, output: str) -> PretrainConfig:
    """ViT-S/16 as published: 400 effective epochs of Kinetics-400, 1,536 videos a step, on eight GPUs."""
    return PretrainConfig(
        output=output,
        data=FramePairConfig(url=data),
        micro_batch_size=64,
        compute=ComputeConfig(workers=8, use_gpu=True, cpus_per_worker=8, threads=2, loader_workers=6),
    )


def vitb16(*, data: str, output: str) -> PretrainConfig:
    """ViT-B/16: the same with a wider encoder."""
    small = vits16(data=data, output=output)
    wider = small.model.model_copy(update={"embed_dim": 768, "num_heads": 12})
    return small.model_copy(update={"model": wider, "micro_batch_size": 32})


def tiny(*, data: str, output: str) -> PretrainConfig:
    """Two CPU cores, two minutes: 128 pixels, 64 patches, 1.5 M parameters; 400 steps where the papers have epochs."""
    return PretrainConfig(
        output=output,
        model=RSPConfig(
            image_size=128,
            embed_dim=128,
            depth=4,
            num_heads=4,
            decoder_embed_dim=96,
            decoder_depth=2,
            decoder_num_heads=3,
            num_latents=16,
            num_classes=16,
        ),
        data=FramePairConfig(url=data, image_size=128),
        optim=OptimConfig(lr_batch_size=PAPER_BATCH_SIZE),
        schedule=ScheduleConfig(epochs=None, warmup_epochs=0, steps=400, warmup_steps=40),
        global_batch_size=16,
        log_every_steps=10,
        checkpoint=CheckpointConfig(every_steps=100),
        compute=ComputeConfig(workers=2),
    )


@dataclass(frozen=True)
class PairBatch:
    """B clips with R pairs each; every pair knows its visit, so that its random numbers do not depend on the batch."""

    images: torch.Tensor  # (B*R, 2, 3, S, S) uint8: current, future
    visits: tuple[tuple[int, int], ...]  # (epoch, clip) of each of the B clips
    repeats: int

    def __len__(self) -> int:
        return len(self.visits)

    def part(self, start: int, stop: int) -> PairBatch:
        """Clips [start, stop)."""
        rows = slice(start * self.repeats, stop * self.repeats)
        return PairBatch(self.images[rows], self.visits[start:stop], self.repeats)


class RSPTask:
    """Frame pairs into RSP's loss, every random number keyed by (seed, epoch, clip, draw)."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self._seed = config.data.seed or config.seed
        self._dataset = FramePairDataset(config.data.model_copy(update={"seed": self._seed}))
        self.num_clips = len(self._dataset)
        self.data_digest = self._dataset.dataset.version
        self.repeats = config.data.repeated_sampling
        self.inputs: tuple[str, ...] = (self.data_digest,)

    def build_model(self) -> RSP:
        """Fresh weights from the global generator."""
        return RSP(self.config.model)

    def prepare(self, model: nn.Module) -> None:
        """Nothing of RSP is computed from the data beforehand."""

    def batches(
        self,
        *,
        steps: range,
        global_batch_size: int,
        micro_batch_size: int,
        group: Group,
        loader_workers: int,
    ) -> Iterator[Sequence[PairBatch]]:
        """This rank's micro-batches of every step."""
        order = SampleOrder(self.num_clips, self._seed)
        loader = step_loader(
            self._dataset,
            order,
            global_batch_size=global_batch_size,
            start_step=steps.start,
            stop_step=steps.stop,
            rank=group.rank,
            world_size=group.world_size,
            num_workers=loader_workers,
            pin_memory=group.device.type == "cuda",
        )
        for step, batch in zip(steps, loader, strict=True):
            epochs, clips = order.slice(*rank_span(step, global_batch_size, group.rank, group.world_size))
            visits = tuple(zip(epochs.tolist(), clips.tolist(), strict=True))
            whole = PairBatch(batch.images, visits, self.repeats)
            yield [
                whole.part(start, min(start + micro_batch_size, len(whole)))
                for start in range(0, len(whole), micro_batch_size)
            ]

    def loss(self, model: nn.Module, batch: PairBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """`loss` and its parts, means over the pairs."""
        images = normalise(batch.images.to(device, non_blocking=True))
        output = model(images[:, 0], images[:, 1], self.draws(batch, device))
        return {name: value for name, value in output._asdict().items() if value is not None}

    def draws(self, batch: PairBatch, device: torch.device) -> RSPDraws:
        """The random numbers of a batch: the same for a pair whatever rank or batch it is in."""
        drawn = [
            _draw_pair(self.config.model, counter_seed(self._seed, "draws", epoch, clip, draw))
            for epoch, clip in batch.visits
            for draw in range(batch.repeats)
        ]
        return RSPDraws(*(torch.stack(column).to(device) for column in zip(*drawn, strict=True)))

    def example(self, num_clips: int) -> PairBatch:
        """Shapes only."""
        side = self.config.model.image_size
        images = torch.empty(num_clips * self.repeats, 2, 3, side, side, dtype=torch.uint8, device="meta")
        return PairBatch(images, tuple((0, clip) for clip in range(num_clips)), self.repeats)

    def batch_tensors(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """Images and visits."""
        return {"images": batch.images, "visits": torch.tensor(batch.visits)}

    def export(self, folder: str, model: nn.Module, *, summary: dict[str, Any]) -> str:
        """Publish the whole model: the encoder's names within it are those of a plain vision transformer."""
        config = self.config
        facts = {
            "data set": self.data_digest,
            "steps": summary["steps"],
            "global batch (videos x pairs)": f"{config.global_batch_size} x {self.repeats}",
            "loss, first step": f"{summary['first'].get('loss', float('nan')):.4f}",
            "loss, mean of the last 50 steps": f"{summary['last'].get('loss', float('nan')):.4f}",
            "future loss, first and last": (
                f"{summary['first'].get('loss_future', float('nan')):.4f}, "
                f"{summary['last'].get('loss_future', float('nan')):.4f}"
            ),
            "config": config.identity_digest(),
        }
        card = model_card(
            "RSP encoder",
            summary="An image encoder pre-trained by stochastic frame prediction (RSP, ICML 2024).",
            facts=facts,
            limits="Trained on one data set at one resolution. The losses above say that training worked, not that "
            "the features are good: see the evaluations that name this export's digest.",
        )
        assert isinstance(model, RSP)
        pictures = predicted_futures(model, self._dataset, seed=counter_seed(self._seed, "pictures"))
        write_bytes(join(folder, PICTURES_NAME), pictures)
        return save_export(
            folder,
            kind="rsp",
            model_config=config.model,
            weights=model.state_dict(),
            preprocessing=Preprocessing(image_size=config.model.image_size),
            card=card,
            inputs=self.inputs,
        )


def _draw_pair(config: RSPConfig, seed: int) -> tuple[torch.Tensor, ...]:
    """(target corruption, posterior sample, prior sample, mask noise) of one pair, in `RSPDraws` order."""
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    if config.target_corruption == "noise":
        corruption = torch.randn(3, side, side, generator=generator)
    else:
        corruption = torch.rand(config.num_patches, generator=generator)
    sample = torch.randn if config.latent == "gaussian" else torch.rand
    posterior, prior = (sample(config.num_latents, generator=generator) for _ in range(2))
    return corruption, posterior, prior, torch.rand(config.num_patches, generator=generator)
