"""Masked autoencoding of single frames (MAE 2022): from nothing, or on from MAE's or VC-1's weights on our video.

    python -m training.main CONFIG.json     with {"kind": "pretrain-mae", ...}, or `tiny(...)` and the others in code

`vitb16` is MAE's published recipe, 400 effective epochs as the papers trained their baselines. `vc1` goes on from
released weights with the same optimiser on the data set at hand; how long, the papers do not say, so its length is
ours. `tiny` is the same recipe with smaller sizes and counts. An epoch is a pass over the clips with one frame each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from infra.compute import ComputeConfig
from infra.digests import sha256_file, sha256_json
from infra.errors import ConfigError, InputError
from infra.storage import is_remote
from training.checkpoint import CheckpointConfig
from training.data.frames import FrameBatch, FrameConfig, FrameDataset
from training.data.pixels import normalise
from training.export import ENCODER_KINDS, model_card, save_export
from training.export_files import is_complete, read_export, read_record
from training.loop import Group
from training.models.common.frozen import plain_config
from training.models.common.images import Preprocessing
from training.models.common.weights import load_weights, read_checkpoint
from training.models.views.mae import MAE, MAEConfig
from training.models.views.mae.model import fill_decoder
from training.models.views.mae.official import encoder_weights, official_weights
from training.optim import OptimConfig, ScheduleConfig
from training.session import RunConfig
from training.state import counter_seed

log = logging.getLogger(__name__)

PAPER_BATCH_SIZE = 4096  # frames, one of each clip

# Dotted keys in which a preset may differ from the paper's: sizes, counts, and where it runs.
SIZES_AND_COUNTS = (
    "model.image_size",
    "model.patch_size",
    "model.embed_dim",
    "model.depth",
    "model.num_heads",
    "model.decoder_embed_dim",
    "model.decoder_depth",
    "model.decoder_num_heads",
    "data.image_size",
    "data.repeated_sampling",
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
_OF_THE_WEIGHTS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


class MAERunConfig(RunConfig):
    """A whole MAE run. `data.seed` 0 follows the run's seed.

    `initial` is what training starts from: an encoder's export, or a `.pth` of MAE's or VC-1's layout. A decoder that
    is not among its weights is drawn. Its position tables are resized to `model.image_size`.
    """

    kind: Literal["pretrain-mae"] = "pretrain-mae"
    model: MAEConfig = MAEConfig()
    data: FrameConfig
    initial: str = ""
    global_batch_size: int = Field(default=PAPER_BATCH_SIZE, gt=0)

    @model_validator(mode="after")
    def _one_image_size(self) -> Self:
        if self.data.image_size != self.model.image_size:
            raise ValueError(f"data.image_size {self.data.image_size} is not model.image_size {self.model.image_size}")
        return self

    def build_task(self) -> MAETask:
        """Open the data set; the model is built later."""
        return MAETask(self)


def vitb16(*, data: str, output: str, initial: str = "") -> MAERunConfig:
    """ViT-B/16: 400 effective epochs, 40 of them warm-up, 4,096 frames a step, on eight GPUs."""
    return MAERunConfig(
        output=output,
        model=MAEConfig(embed_dim=768, num_heads=12),
        data=FrameConfig(url=data),
        initial=initial,
        micro_batch_size=128,
        compute=ComputeConfig(workers=8, use_gpu=True, cpus_per_worker=8, threads=2, loader_workers=6),
    )


def vc1(*, data: str, output: str, initial: str) -> MAERunConfig:
    """VC-1's ViT-B/16 fine-tuned by MAE on our video; a tenth of `vitb16`'s length, 512 frames a step."""
    whole = vitb16(data=data, output=output, initial=initial)
    short = ScheduleConfig(epochs=40, warmup_epochs=4)
    return whole.model_copy(update={"schedule": short, "global_batch_size": 512, "micro_batch_size": 64})


def tiny(*, data: str, output: str, initial: str = "") -> MAERunConfig:
    """For two CPU cores: 64 pixels, 64 patches; 300 steps of 16 clips with four frames each."""
    return MAERunConfig(
        output=output,
        model=MAEConfig(
            image_size=64,
            patch_size=8,
            embed_dim=128,
            depth=4,
            num_heads=4,
            decoder_embed_dim=96,
            decoder_depth=2,
            decoder_num_heads=3,
        ),
        data=FrameConfig(url=data, image_size=64, repeated_sampling=4),
        initial=initial,
        optim=OptimConfig(lr_batch_size=PAPER_BATCH_SIZE),
        schedule=ScheduleConfig(epochs=None, warmup_epochs=0, steps=300, warmup_steps=30),
        global_batch_size=16,
        log_every_steps=10,
        checkpoint=CheckpointConfig(every_steps=100),
        compute=ComputeConfig(workers=2),
    )


class MAETask:
    """Single frames into the masked error, every random number keyed by (seed, epoch, clip, draw)."""

    def __init__(self, config: MAERunConfig) -> None:
        self.config = config
        self._seed = config.data.seed or config.seed
        self._dataset = FrameDataset(config.data.model_copy(update={"seed": self._seed}))
        self.num_clips = len(self._dataset)
        self.repeats = config.data.repeated_sampling
        version = self._dataset.dataset.version
        started_from = (initial_digest(config.initial),) if config.initial else ()
        self.inputs: tuple[str, ...] = (version, *started_from)
        # A run must not go on from a checkpoint when the weights it started from have changed under their name.
        self.data_digest = sha256_json(list(self.inputs)) if started_from else version

    def build_model(self) -> MAE:
        """Fresh weights from the global generator; those to start from follow in `prepare`."""
        return MAE(self.config.model)

    def prepare(self, model: nn.Module) -> None:
        """Copy the weights that the run starts from."""
        assert isinstance(model, MAE)
        if self.config.initial:
            load_initial(model, self.config.initial)

    def batches(
        self, *, steps: range, global_batch_size: int, micro_batch_size: int, group: Group, loader_workers: int
    ) -> Iterator[Sequence[FrameBatch]]:
        """This rank's micro-batches of every step."""
        return self._dataset.batches(
            steps=steps,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            group=group,
            loader_workers=loader_workers,
        )

    def loss(self, model: nn.Module, batch: FrameBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """`loss`, the mean over removed patches of all frames."""
        images = normalise(batch.images.to(device, non_blocking=True))
        return {"loss": model(images, mask_noise=self.mask_noise(batch, device)).loss}

    def mask_noise(self, batch: FrameBatch, device: torch.device) -> torch.Tensor:
        """(B * R, L) noise of a batch's masks: the same for a frame whatever rank or batch it is in."""
        noise = [
            torch.rand(
                self.config.model.num_patches,
                generator=torch.Generator().manual_seed(counter_seed(self._seed, "draws", epoch, clip, draw)),
            )
            for epoch, clip in batch.visits
            for draw in range(batch.repeats)
        ]
        return torch.stack(noise).to(device)

    def example(self, num_clips: int) -> FrameBatch:
        """Shapes only."""
        side = self.config.model.image_size
        images = torch.empty(num_clips * self.repeats, 3, side, side, dtype=torch.uint8, device="meta")
        return FrameBatch(images, tuple((0, clip) for clip in range(num_clips)), self.repeats)

    def batch_tensors(self, batch: FrameBatch) -> dict[str, torch.Tensor]:
        """Images and visits."""
        return {"images": batch.images, "visits": torch.tensor(batch.visits)}

    def export(self, folder: str, model: nn.Module, *, summary: dict[str, Any]) -> str:
        """Publish the encoder; the decoder's weights lie beside it, for a run that goes on from here."""
        assert isinstance(model, MAE)
        config = self.config
        facts = {
            "data set": self.inputs[0],
            "started from": config.initial or "random weights",
            "steps": summary["steps"],
            "global batch (clips x frames)": f"{config.global_batch_size} x {self.repeats}",
            "mask ratio": config.model.mask_ratio,
            "loss, first step": f"{summary['first'].get('loss', float('nan')):.4f}",
            "loss, mean of the last 50 steps": f"{summary['last'].get('loss', float('nan')):.4f}",
            "config": config.identity_digest(),
        }
        card = model_card(
            "MAE encoder",
            summary="An image encoder trained by masked autoencoding of single frames (MAE, CVPR 2022).",
            facts=facts,
            limits="Trained on one data set at one resolution. The losses above say that training worked, not that "
            "the features are good: see the evaluations that name this export's digest.",
        )
        return save_export(
            folder,
            kind="vit-encoder",
            model_config=plain_config(config.model),
            weights=model.state_dict(),
            preprocessing=Preprocessing(image_size=config.model.image_size),
            card=card,
            inputs=self.inputs,
        )


def initial_digest(place: str) -> str:
    """sha256 of the weights at `place`: an export's digest, or that of a checkpoint file. `InputError` if neither."""
    if is_complete(place):
        return str(read_record(place)["digest"])
    if is_remote(place) or not Path(place).is_file():
        raise InputError(
            f"initial weights {place} are neither a finished export nor a checkpoint file.",
            remedy="Give an export's folder or a local .pth of MAE's or VC-1's layout.",
        )
    return sha256_file(Path(place))


def load_initial(model: MAE, place: str) -> None:
    """Copy an export's or an official checkpoint's weights; the decoder stays as drawn where it is not among them.

    Raises `ConfigError` when the export's sizes are others, `InputError` when weights do not fit.
    """
    if not is_complete(place):
        weights = official_weights(read_checkpoint(Path(place)))
        load_weights(model, fill_decoder(weights, model))
        return
    export = read_export(place)
    if export.kind not in ENCODER_KINDS:
        raise InputError(
            f"{place} is a {export.kind!r} export.", remedy=f"Start from one of {', '.join(ENCODER_KINDS)}."
        )
    for name in _OF_THE_WEIGHTS:
        found, wanted = export.model_config.get(name), getattr(model.config, name)
        if found != wanted:
            raise ConfigError(
                f"model.{name} is {wanted}, the weights of {place} are of {found}.",
                remedy="Set the config to what the weights are of.",
            )
    # RSP's decoder has other blocks under the same names.
    whole = export.kind == "vit-encoder" and _same_decoder(model, export.weights)
    if not whole:
        log.warning("%s holds no decoder of these sizes: a new one is drawn", place)
    load_weights(model, fill_decoder(export.weights if whole else encoder_weights(export.weights), model))


def _same_decoder(model: MAE, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the stored decoder is of this model's size; an export's config does not say."""
    names = ("decoder_embed.weight", f"decoder_blocks.{model.config.decoder_depth - 1}.norm1.weight")
    beyond = f"decoder_blocks.{model.config.decoder_depth}.norm1.weight"
    own = model.state_dict()
    return beyond not in weights and all(name in weights and weights[name].shape == own[name].shape for name in names)
