"""The Video Prediction Policy: stage 2 (VPP, ICML 2025), a diffusion policy on features of a frozen video model.

    foreframe train-policy --method vpp --preset tiny        two CPU cores; docs/recipes/vpp.md has times and results
    foreframe train-policy --method vpp --preset calvin      the released run: 4 GPUs, batch 112, lr 1e-4

`tiny` is `metaworld` with smaller sizes and counts and the learning rate that a small network needs. The control arms
are the same recipe with another provider: a video model of random weights, any still encoder, or no pictures at all.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from infra.compute import ComputeConfig
from training.callbacks.policy_validation import PolicyValidationConfig
from training.checkpoint import CheckpointConfig
from training.data.policy_windows import PolicyDataConfig
from training.loop import Callback, Group, Precision, Task
from training.models.common.actions import CodecConfig
from training.models.common.text import SentenceEncoderConfig
from training.models.vpp.config import ActionDenoiserConfig, SamplingConfig, VideoFormerConfig
from training.optim import OptimConfig, ScheduleConfig
from training.providers import FeatureProviderConfig
from training.recipes.vpp_task import VPPTask
from training.session import NOT_IDENTITY, RunConfig

# Where `tiny` may differ from `metaworld`: sizes, counts and places, and the one number that goes with them.
SIZES_AND_COUNTS = (
    "output", "data.url", "data.every", "former.dim", "former.depth", "former.num_latents", "former.num_heads",
    "former.head_dim", "denoiser.dim", "denoiser.encoder_layers", "denoiser.decoder_layers", "denoiser.num_heads",
    "denoiser.chunk", "schedule.steps", "schedule.epochs", "global_batch_size", "log_every_steps", "validation",
    "checkpoint.every_steps", "compute",
    "optim.ema_decay",  # how many steps the average looks back
    "optim.lr",  # 1e-4 teaches a small network of random weights little in 1,500 steps
)  # fmt: skip
# What each preset takes from the video model; pooling and choice of frames are sizes (1 and 0: off, as in the paper).
FEATURES: dict[str, dict[str, Any]] = {
    "calvin": {"cameras": ["static", "gripper"], "noise": "fresh"},
    "metaworld": {},
    "xhand": {"cameras": ["0", "1"], "layers": [1], "noise": "fresh"},
    "tiny": {"pool": 2, "frames": 4},
}
CALVIN_WINDOW = 21  # frames; shorter rests of an episode are no decision
XHAND_WEIGHTS = (2.0,) * 6 + (1.0,) * 12  # translation and rotation count twice


class VPPRunConfig(RunConfig):
    """A whole run. Widths that the features and the episodes decide are filled in when the task is built.

    `provider` None is the control without pictures. `loss_weights`, one for each target dimension, multiply squared
    errors (empty: all 1). `standardise` brings every feature channel to unit deviation; the release does not.
    """

    kind: Literal["train-vpp"] = "train-vpp"
    provider: FeatureProviderConfig | None
    data: PolicyDataConfig
    former: VideoFormerConfig = VideoFormerConfig()
    denoiser: ActionDenoiserConfig = ActionDenoiserConfig()
    sampling: SamplingConfig = SamplingConfig()
    codec: CodecConfig = CodecConfig()
    text: SentenceEncoderConfig = SentenceEncoderConfig()
    standardise: bool = True
    execute: int = Field(default=10, ge=1)
    loss_weights: tuple[float, ...] = ()
    validation: PolicyValidationConfig = PolicyValidationConfig()
    optim: OptimConfig = OptimConfig(lr=1e-4, betas=(0.9, 0.9), weight_decay=0.05, decay="all")
    schedule: ScheduleConfig = ScheduleConfig(epochs=50, warmup_epochs=0, shape="constant")
    global_batch_size: int = Field(default=112, gt=0)
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.execute > self.denoiser.chunk:
            raise ValueError(f"execute {self.execute} exceeds denoiser.chunk {self.denoiser.chunk}")
        if self.data.features and self.provider is None:
            raise ValueError(f"features {self.data.features!r} without a provider")
        if self.validation.every_steps % self.log_every_steps:
            raise ValueError(f"validation.every_steps is no multiple of log_every_steps {self.log_every_steps}")
        return self

    def identity_digest(self) -> str:
        """Not where cached features lie: what they are is part of the data's digest."""
        unplaced = self.data.model_copy(update={"features": "", "memory_bytes": 0})
        return self.model_copy(update={"data": unplaced}).digest(exclude=NOT_IDENTITY)

    def build_task(self) -> VPPTask:
        """Open the episodes; features and the provider are opened when first needed."""
        return VPPTask(self)

    def extra_callbacks(self, task: Task, group: Group) -> list[Callback]:
        """The held-out error, on the first rank alone."""
        assert isinstance(task, VPPTask)
        callback = None if group.rank else task.validation()
        return [callback] if callback else []


def calvin(*, provider: FeatureProviderConfig | None, data: str, output: str, clip: str = "") -> VPPRunConfig:
    """As released for CALVIN: chunks of 10, all carried out, no proprioception, raw features, constant 1e-4.

    `clip` is a folder of CLIP ViT-B/32; without one the packaged sentence encoder takes its place.
    """
    return VPPRunConfig(
        output=output,
        provider=provider,
        data=PolicyDataConfig(url=data, least=CALVIN_WINDOW, proprioception=False),
        sampling=SamplingConfig(sigma_min=1.0),
        codec=CodecConfig(scaling="none", binary=(6,)),
        text=SentenceEncoderConfig(kind="clip", path=clip) if clip else SentenceEncoderConfig(),
        standardise=False,
        compute=ComputeConfig(workers=4, use_gpu=True, cpus_per_worker=8, threads=2, loader_workers=6),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def metaworld(*, provider: FeatureProviderConfig | None, data: str, output: str) -> VPPRunConfig:
    """One language-conditioned policy for Meta-World tasks: chunks of 4, proprioception as one trained token.

    The paper gives the chunk and no more (no code was released for Meta-World); the rest is CALVIN's, with the average
    of the weights that its trainer keeps and never uses.
    """
    return VPPRunConfig(
        output=output,
        provider=provider,
        data=PolicyDataConfig(url=data),
        denoiser=ActionDenoiserConfig(chunk=4, train_proprioception=True),
        execute=4,
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.9), weight_decay=0.05, decay="all", ema_decay=0.9999),
        compute=ComputeConfig(workers=4, use_gpu=True, cpus_per_worker=8, threads=2, loader_workers=6),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def xhand(*, provider: FeatureProviderConfig | None, data: str, output: str, clip: str = "") -> VPPRunConfig:
    """The released dexterous hand: 18 numbers a step relative to the wrist, 1 and 99 percentiles, weighted parts.

    Chunks of 8 as in the code (the paper's table says 10), one at each frame at 10 Hz. `clip` as for `calvin`.
    """
    return VPPRunConfig(
        output=output,
        provider=provider,
        data=PolicyDataConfig(url=data),
        denoiser=ActionDenoiserConfig(chunk=8),
        execute=8,
        codec=CodecConfig(transform="xhand", scaling="bounds", action_range=None),
        text=SentenceEncoderConfig(kind="clip", path=clip) if clip else SentenceEncoderConfig(),
        standardise=False,
        loss_weights=XHAND_WEIGHTS,
        schedule=ScheduleConfig(epochs=500, warmup_epochs=0, shape="constant"),
        global_batch_size=28,
        compute=ComputeConfig(workers=1, use_gpu=True, cpus_per_worker=8, threads=2, loader_workers=6),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def tiny(*, provider: FeatureProviderConfig | None, data: str, output: str) -> VPPRunConfig:
    """`metaworld` on two CPU cores: 4 x 16 pooled feature tokens, width 96, chunks of 8 of which 4 are carried out."""
    return metaworld(provider=provider, data=data, output=output).model_copy(
        update={
            "former": VideoFormerConfig(dim=96, depth=2, num_latents=4, num_heads=4, head_dim=24),
            "denoiser": ActionDenoiserConfig(
                chunk=8, dim=96, encoder_layers=3, decoder_layers=2, num_heads=4, train_proprioception=True
            ),
            "data": PolicyDataConfig(url=data, every=2),
            "optim": OptimConfig(lr=1e-3, betas=(0.9, 0.9), weight_decay=0.05, decay="all", ema_decay=0.99),
            "schedule": ScheduleConfig(epochs=None, warmup_epochs=0, steps=1500, shape="constant"),
            "global_batch_size": 128,
            "log_every_steps": 25,
            "validation": PolicyValidationConfig(every_steps=250, decisions=128),
            "checkpoint": CheckpointConfig(every_steps=500),
            # Minutes of training: a group of workers would take longer to start than it saves.
            "compute": ComputeConfig(workers=0),
        }
    )
