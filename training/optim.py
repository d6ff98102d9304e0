"""Optimiser, learning rate and weight average: AdamW, the base-rate rule, warm-up, hold and half a cosine.

The papers count *effective* epochs: a pass over the videos with `repeats` draws per video counts `repeats` times
(RSP official code). Schedules here are functions of the training step on the fractional pass, so they do not depend
on how a global batch is split over ranks and micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from infra.config import Config
from infra.errors import ConfigError

BASE_BATCH_SIZE = 256  # the batch a base learning rate refers to


class OptimConfig(Config):
    """AdamW with the base-rate rule: learning rate = `base_lr` x (global batch in videos) / 256."""

    base_lr: float = Field(default=1.5e-4, gt=0)
    lr: float | None = Field(default=None, gt=0, description="absolute learning rate; replaces the rule")
    lr_batch_size: int | None = Field(
        default=None,
        gt=0,
        description="batch (videos) the rule is evaluated at; None: the global batch. A small run keeps the large "
        "batch here: the linear rule holds between large batches, at 32 it gives a rate nothing is learnt with.",
    )
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    decay: Literal["matrices", "all"] = "matrices"  # matrices: neither 1-D parameters nor biases decay
    clip_norm: float | None = Field(default=None, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)

    def learning_rate(self, global_batch_size: int) -> float:
        """The peak learning rate of a run with this batch (in videos; repeated draws do not count)."""
        if self.lr is not None:
            return self.lr
        return self.base_lr * (self.lr_batch_size or global_batch_size) / BASE_BATCH_SIZE


Shape = Literal["cosine", "constant", "tri-stage"]


class ScheduleConfig(Config):
    """How long, in effective epochs or, with `steps`, in training steps; and how the learning rate moves.

    "cosine" falls to `min_lr` from warm-up to the run's end; "constant" stays. "tri-stage" (VPP's configuration) warms
    up from `start_lr`, holds the peak, falls to `min_lr` by half a cosine as long as `decay`, and stays there. Stages
    have the unit of the length.
    """

    epochs: float | None = Field(default=400.0, gt=0)
    warmup_epochs: float = Field(default=40.0, ge=0)
    hold_epochs: float = Field(default=0.0, ge=0)
    decay_epochs: float | None = Field(default=None, gt=0, description="None: to the end of the run")
    steps: int | None = Field(default=None, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    hold_steps: int = Field(default=0, ge=0)
    decay_steps: int | None = Field(default=None, gt=0, description="None: to the end of the run")
    start_lr: float = Field(default=0.0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    shape: Shape = "cosine"

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps; set the other to null")
        warmup, hold, _ = self.stages
        length = self.epochs if self.epochs is not None else self.steps
        if length is not None and warmup >= length:
            raise ValueError(f"warm-up {warmup} must be shorter than the run {length}")
        if length is not None and warmup + hold >= length:
            raise ValueError(f"warm-up {warmup} and hold {hold} must be shorter than the run {length}")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> ScheduleConfig:
        stages = ("hold_epochs", "hold_steps", "decay_epochs", "decay_steps", "start_lr")
        given = [name for name in stages if getattr(self, name)]
        if given and self.shape != "tri-stage":
            raise ValueError(f"{given[0]} belongs to shape tri-stage, not {self.shape}")
        other = "steps" if self.epochs is not None else "epochs"
        if mixed := [name for name in given if name.endswith(other)]:
            raise ValueError(f"{mixed[0]} is not in the unit of the run's length")
        return self

    @property
    def stages(self) -> tuple[float, float, float | None]:
        """Warm-up, hold and decay in the unit of the length."""
        if self.epochs is not None:
            return self.warmup_epochs, self.hold_epochs, self.decay_epochs
        return self.warmup_steps, self.hold_steps, self.decay_steps


@dataclass(frozen=True)
class Schedule:
    """Learning rate and pass of every training step. `end`, `warmup`, `hold`, `decay` are fractional steps."""

    peak_lr: float
    min_lr: float
    warmup: float
    end: float
    shape: Shape
    steps_per_pass: float
    start_lr: float = 0.0
    hold: float = 0.0
    decay: float | None = None  # None: from the hold to the end

    @property
    def total_steps(self) -> int:
        """Whole training steps of the run, at least one."""
        return max(1, math.floor(self.end + 1e-9))

    def passes(self, step: int) -> float:
        """Fractional passes over the videos after `step` training steps."""
        return step / self.steps_per_pass

    def lr(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished ones: linear warm-up, then the shape."""
        if step < self.warmup:
            return self.start_lr + (self.peak_lr - self.start_lr) * step / self.warmup
        begin = self.warmup + self.hold
        if self.shape == "constant" or step < begin:
            return self.peak_lr
        progress = min(1.0, (step - begin) / (self.end - begin if self.decay is None else self.decay))
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def plan_schedule(
    schedule: ScheduleConfig, optim: OptimConfig, *, num_clips: int, global_batch_size: int, repeats: int = 1
) -> Schedule:
    """Turn epochs into steps for a data set: passes = effective epochs / `repeats`; nothing is padded or dropped.

    `ConfigError` for a tri-stage schedule whose ends lie above its peak.
    """
    steps_per_pass = num_clips / global_batch_size

    def in_steps(length: float) -> float:
        return length / repeats * steps_per_pass if schedule.epochs is not None else float(length)

    warmup, hold, decay = schedule.stages
    peak = optim.learning_rate(global_batch_size)
    for name, value in (("start_lr", schedule.start_lr), ("min_lr", schedule.min_lr)):
        if schedule.shape == "tri-stage" and value > peak:
            raise ConfigError(
                f"schedule.{name} {value} is above the peak {peak}.", remedy="Lower it, or raise optim.lr."
            )
    return Schedule(
        peak_lr=peak,
        min_lr=schedule.min_lr,
        warmup=in_steps(warmup),
        end=in_steps(schedule.epochs if schedule.epochs is not None else schedule.steps or 0),
        shape=schedule.shape,
        steps_per_pass=steps_per_pass,
        start_lr=schedule.start_lr,
        hold=in_steps(hold),
        decay=None if decay is None else in_steps(decay),
    )


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in two groups: with weight decay, and without (1-D parameters and biases unless `decay` is "all")."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = config.decay == "matrices" and (parameter.ndim <= 1 or name.endswith(".bias"))
        (free if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=config.betas, eps=config.eps, fused=True
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class WeightAverage:
    """Exponential moving average of a model's trainable parameters, by name."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average = decay x average + (1 - decay) x weight."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(parameter.detach(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's trainable parameters with the average."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                parameter.copy_(self.weights[name])
