"""The step loop: batches in, updates out. It knows no cluster, no tracker and no model.

What a model family must bring is a `Task`; what happens around a step (checkpoints, logs, metrics) is a callback; how
many processes share a step is a `Group`. The global batch is constant: a rank's share is cut into micro-batches whose
gradients add up, and every rank has an equal share.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from infra.errors import TrainingError
from infra.faults import fault_point
from training.optim import Schedule, set_lr
from training.state import TrainState, counter_seed

log = logging.getLogger(__name__)

Precision = Literal["float32", "bf16"]


class Batch(Protocol):
    """One micro-batch. Its length counts clips (or episodes' windows), not draws from them."""

    def __len__(self) -> int: ...


class Task(Protocol):
    """What is trained: a data set, a model and a loss. Built anew, from the config, in every process."""

    num_clips: int
    data_digest: str
    repeats: int  # draws per clip: divides effective epochs

    def build_model(self) -> nn.Module:
        """A freshly initialised model; the caller has seeded the global generator."""
        ...

    def prepare(self, model: nn.Module) -> None:
        """Set what the model takes from the data before training, e.g. statistics; not called after a resume."""
        ...

    def batches(
        self, *, steps: range, global_batch_size: int, micro_batch_size: int, group: Group, loader_workers: int
    ) -> Iterator[Sequence[Any]]:
        """This rank's micro-batches (`Batch` each) of every training step in `steps`."""
        ...

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
        """Scalars averaged over the batch; the gradient is taken of `loss`, the others are logged."""
        ...

    def example(self, num_clips: int) -> Any:
        """A micro-batch of that many clips on the meta device: shapes without content, to plan memory."""
        ...

    def batch_tensors(self, batch: Any) -> dict[str, torch.Tensor]:
        """The batch as plain tensors, to keep the one that broke a run."""
        ...


@dataclass(frozen=True)
class Group:
    """The processes that share one run. `torch.distributed` is used when it has been initialised."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def wrap(self, module: nn.Module) -> nn.Module:
        """Average gradients over the group on the last micro-batch of a step."""
        return module if self.world_size == 1 else DistributedDataParallel(module, gradient_as_bucket_view=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


@dataclass(frozen=True)
class LoopPlan:
    """Everything about the steps that is decided before the first one."""

    schedule: Schedule
    global_batch_size: int
    seed: int
    precision: Precision = "bf16"
    clip_norm: float | None = None

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.schedule.total_steps


@dataclass
class StepEvent:
    """What callbacks are told after a step. `metrics` hold global means; times are this rank's."""

    step: int  # finished updates
    total_steps: int
    epoch: float  # passes over the videos
    metrics: dict[str, float]
    step_s: float
    wait_s: float  # part of step_s spent waiting for data
    num_clips: int


class Callback:
    """Cross-cutting behaviour. Every rank has the same callbacks and calls each at the same steps."""

    def at_start(self, state: TrainState) -> None:
        """Before the first step, after a resume."""

    def after_step(self, event: StepEvent, state: TrainState) -> None:
        """After each update."""

    def at_failure(self, event: StepEvent, batches: Sequence[Batch]) -> None:
        """A loss or gradient was not finite; no update was made. The loop raises afterwards."""

    def at_end(self, state: TrainState) -> None:
        """After the last step; also when there was none left to do."""


def run_loop(
    task: Task,
    state: TrainState,
    *,
    plan: LoopPlan,
    group: Group,
    batches: Iterator[Sequence[Batch]],
    callbacks: Sequence[Callback],
) -> None:
    """Train from `state.step` to the end of the plan, in place. Nothing left to do is a normal case.

    Raises `TrainingError` on every rank at the same step when a loss or gradient is not finite.
    """
    module = group.wrap(_Loss(task, state.model, group.device))
    module.train()
    for callback in callbacks:
        callback.at_start(state)
    while state.step < plan.total_steps:
        fault_point("train.step", f"rank={group.rank} step={state.step}.")
        started = time.perf_counter()
        micro_batches = next(batches)
        wait_s = time.perf_counter() - started
        lr = plan.schedule.lr(state.step)
        set_lr(state.optimizer, lr)
        # Reseeded every step: dropout and the like then need no saved generator, on any rank.
        torch.manual_seed(counter_seed(plan.seed, "step", state.step, group.rank))
        metrics = accumulate_gradients(module, micro_batches, plan, group)
        metrics |= {"grad_norm": _clip(state.model, plan.clip_norm), "lr": lr}
        event = StepEvent(
            step=state.step + 1,
            total_steps=plan.total_steps,
            epoch=plan.schedule.passes(state.step + 1),
            metrics=metrics,
            step_s=time.perf_counter() - started,
            wait_s=wait_s,
            num_clips=plan.global_batch_size,
        )
        _require_finite(event, micro_batches, callbacks)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if state.average is not None:
            state.average.update(state.model)
        state.advance(metrics)
        event.step_s = time.perf_counter() - started
        for callback in callbacks:
            callback.after_step(event, state)
    for callback in callbacks:
        callback.at_end(state)


def accumulate_gradients(
    module: nn.Module, micro_batches: Sequence[Batch], plan: LoopPlan, group: Group
) -> dict[str, float]:
    """Forward and backward of this rank's share; gradients and metrics are means over the global batch."""
    totals: dict[str, torch.Tensor] = {}
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        share = len(batch) / plan.global_batch_size
        with contextlib.nullcontext() if last or group.world_size == 1 else module.no_sync():  # type: ignore[operator]
            with torch.autocast(group.device.type, dtype=torch.bfloat16, enabled=plan.precision == "bf16"):
                losses = module(batch)
            # DDP divides by the world size; the share is of the global batch already.
            (losses["loss"] * share * group.world_size).backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, torch.zeros(())) + value.detach().float().cpu() * share
    summed = group.sum(torch.stack(list(totals.values())).to(group.device))
    return dict(zip(totals, summed.tolist(), strict=True))


class _Loss(nn.Module):
    """The task's loss as a module, so that gradient averaging sees one forward whatever the model's methods are."""

    def __init__(self, task: Task, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._task = task
        self._device = device

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return self._task.loss(self.model, batch, self._device)


def _clip(model: nn.Module, clip_norm: float | None) -> float:
    """Norm of the whole gradient, before clipping to `clip_norm`."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return float(norm)


def _require_finite(event: StepEvent, batches: Sequence[Batch], callbacks: Sequence[Callback]) -> None:
    broken = [name for name in ("loss", "grad_norm") if not math.isfinite(event.metrics[name])]
    if not broken:
        return
    for callback in callbacks:
        callback.at_failure(event, batches)
    raise TrainingError(
        f"{broken[0]} is {event.metrics[broken[0]]} at step {event.step} of {event.total_steps} "
        f"(lr {event.metrics['lr']:.3g}); the weights were not updated.",
        remedy="The batch is saved below the output folder in failed/. Lower optim.base_lr or look at that batch.",
    )
