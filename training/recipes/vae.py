"""The small video autoencoder behind `finetune --preset tiny`: fitted on the corpus it will encode.

    {"kind": "fit-vae", ...}     224 steps of 16 frames of 64 pixels: two minutes on one CPU core

Released weights need none of this. A random autoencoder cannot decode, so where none is given this recipe comes first:
single frames, squared error + 0.1 absolute error + 1e-6 KL divergence. Each frame is decoded alone (num_frames 1): the
decoder's temporal layers are never shown a second frame, so it must decode one at a time ever after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from infra.compute import ComputeConfig
from infra.config import Config
from infra.storage import join, write_bytes, write_json
from ingest.windows import ClipSource
from training.checkpoint import CheckpointConfig
from training.data.loader import step_loader
from training.data.rng import ClipRandom
from training.data.video_clips import ClipVisit, VideoClipDataset, VideoDataConfig, resize_clip, to_model_range
from training.export import model_card
from training.export_video import VIDEO_LOADING, save_vae_export
from training.loop import Group
from training.models.tvp import VAEConfig
from training.models.tvp.autoencoder import random_autoencoder
from training.optim import OptimConfig, ScheduleConfig
from training.recipes.sources import clip_sources, held_out
from training.recipes.vae_quality import REPORT_NAME, SHEET_NAME, latent_deviation, measure, spread_frames
from training.session import RunConfig
from training.state import counter_seed


class VAELossConfig(Config):
    """Weights beside the squared error, all on pixels in [-1, 1]; the KL is summed over a frame's latents."""

    l1: float = Field(default=0.1, ge=0)
    kl: float = Field(default=1e-6, ge=0)


class FitVAEConfig(RunConfig):
    """A whole autoencoder run. `report_frames` frames of each split are measured when it is exported."""

    kind: Literal["fit-vae"] = "fit-vae"
    vae: VAEConfig = VAEConfig()
    data: VideoDataConfig
    loss: VAELossConfig = VAELossConfig()
    report_frames: int = Field(default=512, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        side, downscale = self.data.image_size, self.vae.downscale
        if side % downscale:
            raise ValueError(f"data.image_size {side} does not divide by the autoencoder's {downscale}")
        if cached := [source.name for source in self.data.sources if source.latents]:
            raise ValueError(f"sources {cached} name a latent cache; an autoencoder is fitted on pixels")
        return self

    def build_task(self) -> VAETask:
        """Open the data sets; the model is built later."""
        return VAETask(self)


def tiny(*, data: str | Sequence[str | ClipSource], output: str) -> FitVAEConfig:
    """64 pixels to 4 x 8 x 8 latents, 1.1 M parameters; 224 steps of 16 frames on one core."""
    return FitVAEConfig(
        output=output,
        vae=VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, sample_size=64),
        data=VideoDataConfig(sources=clip_sources(data), image_size=64),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=ScheduleConfig(epochs=None, warmup_epochs=0, steps=224, warmup_steps=50),
        global_batch_size=16,
        log_every_steps=10,
        checkpoint=CheckpointConfig(every_steps=100),
        # Two minutes of training: a group of workers would take longer to start than it saves.
        compute=ComputeConfig(workers=0),
    )


@dataclass(frozen=True)
class FrameBatch:
    """B frames, each drawn from the episode of one clip."""

    pixels: torch.Tensor  # (B, 3, S, S) uint8, or float32 0..255 when one of them was resized
    visits: tuple[ClipVisit, ...]

    def __len__(self) -> int:
        return len(self.visits)

    def part(self, start: int, stop: int) -> FrameBatch:
        """Frames [start, stop)."""
        return FrameBatch(self.pixels[start:stop], self.visits[start:stop])

    def pin_memory(self) -> FrameBatch:
        """Called by the loader: page-locked memory for asynchronous copies to a GPU."""
        return FrameBatch(self.pixels.pin_memory(), self.visits)


class FrameDataset(Dataset[FrameBatch]):
    """One frame of the whole episode for each visit of a clip, every frame as likely as any other."""

    def __init__(self, clips: VideoClipDataset) -> None:
        self.clips = clips

    def __getitems__(self, visits: Sequence[tuple[int, int, int]]) -> FrameBatch:
        """The frames of these (source, epoch, clip) visits."""
        seen = tuple(self.clips.visit(*visit) for visit in visits)
        frames = [self._frame(visit) for visit in seen]
        if any(frame.is_floating_point() for frame in frames):
            frames = [frame.float() for frame in frames]
        return FrameBatch(torch.cat(frames), seen)

    def _frame(self, visit: ClipVisit) -> torch.Tensor:
        windows = self.clips.windows[visit.source]
        sample, _ = windows.locate(visit.clip)
        seed = counter_seed(self.clips.config.seed, "frame", visit.source)
        random = ClipRandom(seed, epoch=visit.epoch, clip=visit.clip)
        frame = random.integer(0, windows.dataset.num_frames(sample, visit.camera) - 1)
        return resize_clip(windows.dataset.frames(sample, [frame], visit.camera), self.clips.config.image_size)


class VAETask:
    """Frames into the reconstruction loss, the posterior's noise keyed by (seed, source, epoch, clip)."""

    repeats = 1

    def __init__(self, config: FitVAEConfig) -> None:
        self.config = config
        self._seed = config.data.seed or config.seed
        self._clips = VideoClipDataset(config.data.model_copy(update={"seed": self._seed}))
        self.num_clips = self._clips.num_clips
        self.data_digest = self._clips.data_digest
        self.inputs: tuple[str, ...] = self._clips.inputs

    def build_model(self) -> nn.Module:
        """Fresh weights from the global generator."""
        model: nn.Module = random_autoencoder(self.config.vae)
        return model

    def prepare(self, model: nn.Module) -> None:
        """The scale of the latents is measured when the weights are final."""

    def batches(
        self, *, steps: range, global_batch_size: int, micro_batch_size: int, group: Group, loader_workers: int
    ) -> Iterator[Sequence[FrameBatch]]:
        """This rank's micro-batches of every step."""
        loader = step_loader(
            FrameDataset(self._clips),
            self._clips.mixture,
            global_batch_size=global_batch_size,
            start_step=steps.start,
            stop_step=steps.stop,
            rank=group.rank,
            world_size=group.world_size,
            num_workers=loader_workers,
            pin_memory=group.device.type == "cuda",
        )
        for batch in loader:
            starts = range(0, len(batch), micro_batch_size)
            yield [batch.part(start, min(start + micro_batch_size, len(batch))) for start in starts]

    def loss(self, model: nn.Module, batch: FrameBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """`loss` and its parts, means over the frames; errors in float32 whatever the network computes in."""
        pixels = to_model_range(batch.pixels.to(device, non_blocking=True))
        posterior = model.encode(pixels).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        latents = mean + std * self._noise(batch, mean)
        decoded = model.decode(latents, num_frames=1).sample.float()
        mse, l1 = F.mse_loss(decoded, pixels), F.l1_loss(decoded, pixels)
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(dim=1).mean()
        weights = self.config.loss
        return {"loss": mse + weights.l1 * l1 + weights.kl * kl, "mse": mse, "l1": l1, "kl": kl}

    def example(self, num_clips: int) -> FrameBatch:
        """Shapes only."""
        side = self.config.data.image_size
        visits = tuple(ClipVisit(0, 0, clip, "main") for clip in range(num_clips))
        return FrameBatch(torch.empty(num_clips, 3, side, side, dtype=torch.uint8, device="meta"), visits)

    def batch_tensors(self, batch: FrameBatch) -> dict[str, torch.Tensor]:
        """Pixels and visits."""
        return {"pixels": batch.pixels, "visits": torch.tensor([visit[:3] for visit in batch.visits])}

    def export(self, folder: str, model: nn.Module, *, summary: dict[str, Any]) -> str:
        """Measure the latents' scale on training frames and the pictures on held-out ones; publish both."""
        config = self.config
        model.eval()
        sources, side = config.data.sources, config.data.image_size
        training = spread_frames(sources, config.report_frames, size=side)
        deviation = latent_deviation(model, training)
        unseen = spread_frames(held_out(sources) or sources, config.report_frames, size=side)
        quality, sheet = measure(model, training, unseen)
        summary["reconstruction"] = quality
        write_json(join(folder, REPORT_NAME), quality)
        write_bytes(join(folder, SHEET_NAME), sheet)
        facts = {
            "data": ", ".join(self.inputs),
            "steps": summary["steps"],
            "loss, mean of the last 50 steps": f"{summary['last'].get('loss', float('nan')):.5f}",
            "frames measured": f"{quality['frames']} of split {quality['split']}",
            "PSNR, whole picture": f"{quality['psnr_db']} dB (mean picture of the label: {quality['floor_db']} dB)",
            "PSNR, moving pixels": f"{quality['moving_db']} dB (mean picture: {quality['moving_floor_db']} dB)",
            "latent deviation": f"{deviation:.4f}",
            "config": config.identity_digest(),
        }
        return save_vae_export(
            folder,
            model,
            config.vae.model_copy(update={"scaling_factor": 1.0 / deviation}),
            image_size=side,
            card=model_card(
                "Video autoencoder",
                summary="An AutoencoderKLTemporalDecoder fitted on single frames of one corpus.",
                facts=facts,
                limits="It knows the scenes of its corpus and no others. Decode one frame at a time.",
                loading=VIDEO_LOADING,
            ),
            inputs=self.inputs,
        )

    def _noise(self, batch: FrameBatch, like: torch.Tensor) -> torch.Tensor:
        if like.is_meta:
            return torch.empty_like(like)
        drawn = [_unit_noise(like.shape[1:], self._seed, visit) for visit in batch.visits]
        return torch.stack(drawn).to(like.device)


def _unit_noise(shape: torch.Size, seed: int, visit: ClipVisit) -> torch.Tensor:
    key = counter_seed(seed, "posterior", visit.source, visit.epoch, visit.clip)
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))
