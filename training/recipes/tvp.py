"""Fine-tuning of a text-guided video model: stage 1 of the Video Prediction Policy (VPP, ICML 2025).

    foreframe finetune --preset tiny     800 steps of 8 clips from random weights: seven minutes on one CPU core
    foreframe finetune --preset svd      the published run: Stable Video Diffusion, 100,000 steps of 48 clips, 8 GPUs

`tiny` is the published recipe with smaller sizes and counts, and with the learning rate that random weights need:
5e-6 is for fine-tuning released weights, from nothing it learns nothing in a few hundred steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from infra.compute import ComputeConfig
from infra.storage import absolute, join
from ingest.windows import ClipSource, WindowRule
from training.callbacks.previews import PREVIEWS, PreviewConfig, Previews
from training.checkpoint import CheckpointConfig
from training.data.video_clips import VideoDataConfig
from training.loop import Callback, Group, Task
from training.models.common.text import TextEncoderConfig
from training.models.tvp.config import TVPConfig, UNetConfig, VAEConfig
from training.optim import OptimConfig, ScheduleConfig
from training.recipes.sources import clip_sources
from training.session import RunConfig

if TYPE_CHECKING:
    from training.recipes.tvp_task import TVPTask

CLIP_FOLDER = "clip-vit-base-patch32"  # a local folder with the text encoder of the released weights

# Dotted keys in which a preset may differ from the published one: sizes, counts, where it starts from and where it
# runs. The learning rate belongs to where it starts from; activations are computed twice where memory asks for it.
SIZES_AND_COUNTS = (
    "model.unet",
    "model.vae",
    "model.text",
    "model.num_frames",
    "model.image_size",
    "model.decode_chunk",
    "data.sources",
    "data.image_size",
    "initial",
    "vae",
    "optim.lr",
    "schedule.steps",
    "global_batch_size",
    "micro_batch_size",
    "checkpoint_activations",
    "checkpoint.every_steps",
    "previews.every_steps",
    "previews.validation_clips",
    "compute",
)


class FinetuneConfig(RunConfig):
    """A whole fine-tuning run. `data.seed` 0 follows the run's seed.

    `initial` (a diffusers folder or a tvp export) brings all weights; without it the UNet starts random and `vae`
    names the autoencoder's export. Which autoencoder it is decides `model.vae`, whatever stands there.
    `latents` says what a cache gives: a sample of the posterior, drawn anew at every visit, or its mean.
    `condition_noise` is the pixel path's noise on the first frame's picture; a cache knows no pixels and has none.
    """

    kind: Literal["finetune-tvp"] = "finetune-tvp"
    model: TVPConfig = TVPConfig()
    initial: str = ""
    vae: str = ""
    data: VideoDataConfig
    latents: Literal["sample", "mode"] = "sample"
    condition_noise: bool = True
    checkpoint_activations: bool = False
    previews: PreviewConfig = PreviewConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.data.image_size != self.model.image_size:
            raise ValueError(f"data.image_size {self.data.image_size} is not model.image_size {self.model.image_size}")
        if self.data.num_frames != self.model.num_frames:
            raise ValueError(f"clips of {self.data.num_frames} frames for model.num_frames {self.model.num_frames}")
        if self.initial and self.vae:
            raise ValueError(f"initial {self.initial!r} brings its autoencoder; leave vae empty, not {self.vae!r}")
        cached = [source.name for source in self.data.sources if source.latents]
        if 0 < len(cached) < len(self.data.sources):
            raise ValueError(f"only the sources {cached} have a latent cache; cache all or none")
        if self.previews.every_steps % self.log_every_steps:
            raise ValueError(f"previews.every_steps is no multiple of log_every_steps {self.log_every_steps}")
        return self

    def build_task(self) -> TVPTask:
        """Open data sets, caches and the autoencoder; the UNet is built later."""
        from training.recipes.tvp_task import TVPTask

        return TVPTask(self)

    def extra_callbacks(self, task: Task, group: Group) -> list[Callback]:
        """Previews and the validation loss, on the first rank alone."""
        from training.recipes.tvp_task import TVPTask

        if group.rank or not self.previews.every_steps:
            return []
        assert isinstance(task, TVPTask)
        folder = join(absolute(self.output), PREVIEWS)
        return [
            Previews(
                self.previews,
                folder=folder,
                predictor=task.predictor,
                clips=task.preview_clips,
                tracking=self.tracking,
                seed=self.seed,
            )
        ]


def svd(
    *, initial: str, data: str | Sequence[str | ClipSource], output: str, clip: str = CLIP_FOLDER
) -> FinetuneConfig:
    """As published: 16 frames of 256 pixels, all 1.5 B parameters, eight GPUs, 48 clips a step, bf16.

    `initial` is a folder in Stable Video Diffusion's layout, `clip` one of CLIP ViT-B/32. `model.position_code` is as
    in the robot release (svd-robot); the CALVIN release has it off.
    """
    return FinetuneConfig(
        output=output,
        model=TVPConfig(text=TextEncoderConfig(kind="clip", path=clip, truncate=True)),
        initial=initial,
        data=VideoDataConfig(sources=clip_sources(data)),
        optim=OptimConfig(lr=5e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip_norm=1.0),
        schedule=ScheduleConfig(epochs=None, warmup_epochs=0, steps=100_000, shape="constant"),
        global_batch_size=48,
        micro_batch_size=6,
        checkpoint_activations=True,
        checkpoint=CheckpointConfig(every_steps=2000),
        previews=PreviewConfig(every_steps=2000, validation_clips=32),
        compute=ComputeConfig(workers=8, use_gpu=True, cpus_per_worker=8, threads=2, loader_workers=6),
    )


def tiny(*, vae: str, data: str | Sequence[str | ClipSource], output: str) -> FinetuneConfig:
    """One CPU core, seven minutes: 8 frames (every fourth) of 64 pixels as 8 x 8 latents, 3 M parameters.

    `vae` is the export of a fit-vae run. It was fitted on single frames, so it decodes one at a time.
    """
    model = TVPConfig(
        unet=UNetConfig(
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            num_attention_heads=(2, 4, 4),
            cross_attention_dim=768,
            addition_time_embed_dim=64,
            sample_size=8,
        ),
        vae=VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, sample_size=64),
        text=TextEncoderConfig(kind="minilm", truncate=True),
        num_frames=8,
        image_size=64,
        decode_chunk=1,
    )
    rule = WindowRule(num_frames=8, stride=4, short="repeat")
    return FinetuneConfig(
        output=output,
        model=model,
        vae=vae,
        data=VideoDataConfig(sources=clip_sources(data, rule), image_size=64),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip_norm=1.0),
        schedule=ScheduleConfig(epochs=None, warmup_epochs=0, steps=800, shape="constant"),
        global_batch_size=8,
        checkpoint=CheckpointConfig(every_steps=200),
        previews=PreviewConfig(every_steps=200, validation_clips=16),
        # Minutes of training: a group of workers would take longer to start than it saves.
        compute=ComputeConfig(workers=0),
    )
