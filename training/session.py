"""One process's part of a run: set up the machine, resume, train, report. No Ray here either.

The same function runs in the calling process (tests, `workers=0`) and in every Ray Train worker.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import nn

from infra.compute import ComputeConfig, apply_compute
from infra.config import Config
from infra.digests import sha256_json, short
from infra.errors import ConfigError
from infra.storage import absolute, join
from training.callbacks.checkpointing import Checkpointing, Publish
from training.callbacks.metrics_file import METRICS_NAME, MetricsFile
from training.callbacks.offending_batch import OffendingBatch
from training.callbacks.progress import Progress
from training.callbacks.tracking import Tracking, TrackingConfig
from training.checkpoint import CheckpointConfig, load_checkpoint, newest_valid, read_checkpoint
from training.loop import Batch, Callback, Group, LoopPlan, Precision, Task, run_loop
from training.optim import (
    OptimConfig,
    Schedule,
    ScheduleConfig,
    WeightAverage,
    build_optimizer,
    plan_schedule,
)
from training.state import Identity, TrainState, counter_seed, load_model, summarise

log = logging.getLogger(__name__)

# What may differ between two executions of the same run.
NOT_IDENTITY = frozenset({"output", "compute", "checkpoint", "tracking", "log_every_steps"})


class ExportableTask(Task, Protocol):
    """A task that knows how its model is published."""

    inputs: tuple[str, ...]  # digests of everything the model is made from

    def export(self, folder: str, model: nn.Module, *, summary: dict[str, Any]) -> str:
        """Write the export folder, its record last; returns the export's digest.

        What the task measures on the finished model it adds to `summary`, which becomes the run's `summary.json`.
        """
        ...


class RunConfig(Config):
    """What every recipe has. Subclasses add `kind`, the model and the data."""

    output: str = Field(min_length=1, description="folder or s3:// prefix of everything the run leaves behind")
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    global_batch_size: int = Field(gt=0, description="clips per training step, over all ranks and micro-batches")
    micro_batch_size: int | None = Field(default=None, gt=0, description="clips per forward pass of one rank")
    precision: Precision = "bf16"
    seed: int = Field(default=0, ge=0, lt=2**63)
    log_every_steps: int = Field(default=10, gt=0)
    checkpoint: CheckpointConfig = CheckpointConfig()
    compute: ComputeConfig = ComputeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @abstractmethod
    def build_task(self) -> ExportableTask:
        """The data, model and loss this config describes."""

    def extra_callbacks(self, task: Task, group: Group) -> list[Callback]:
        """What this recipe adds around its steps; called on every rank, with the task it built.

        They come before the project's own, so what they add to a step's metrics is written down and tracked.
        """
        return []

    @property
    def name(self) -> str:
        """What the run trains, the first half of its stable name."""
        return str(getattr(self, "kind", "run"))

    def identity_digest(self) -> str:
        """sha256 of everything that decides the result."""
        return self.digest(exclude=NOT_IDENTITY)

    def run_name(self) -> str:
        """The same for every execution of the same run: where its checkpoints are."""
        return f"{self.name}-{short(sha256_json([self.name, self.identity_digest()]))}"

    def checkpoints_url(self) -> str:
        """Folder of this run's checkpoints."""
        return join(absolute(self.output), "checkpoints", self.run_name())


def schedule_of(config: RunConfig, task: Task) -> Schedule:
    """The run's steps and learning rates."""
    if config.global_batch_size > task.num_clips * 1000:
        raise ConfigError(f"global_batch_size = {config.global_batch_size} for {task.num_clips} clips.")
    return plan_schedule(
        config.schedule,
        config.optim,
        num_clips=task.num_clips,
        global_batch_size=config.global_batch_size,
        repeats=task.repeats,
    )


def new_state(config: RunConfig, task: Task, device: torch.device) -> TrainState:
    """A freshly initialised run: weights are a function of the seed."""
    torch.manual_seed(counter_seed(config.seed, "initialise"))
    model = task.build_model().to(device)
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, config.optim),
        average=WeightAverage(model, config.optim.ema_decay) if config.optim.ema_decay else None,
        identity=identity_of(config, task),
    )


def identity_of(config: RunConfig, task: Task) -> Identity:
    """What decides the result of the run."""
    return Identity(config.identity_digest(), task.data_digest, config.seed)


def train(config: RunConfig, task: Task, group: Group, publish: Publish) -> dict[str, Any]:
    """Train this process's share from the newest valid checkpoint to the end; returns the summary.

    Raises `TrainingError` (on all ranks alike), `CheckpointError`, and what reading the data set raises.
    """
    started = time.monotonic()
    schedule = schedule_of(config, task)
    state = new_state(config, task, group.device)
    # Rank 0 looks, so that all ranks resume from the same place.
    resumed_from = group.from_first(newest_valid(config.checkpoints_url()) if group.rank == 0 else None)
    if resumed_from:
        load_checkpoint(resumed_from, state)
    state.matmul = group.from_first(apply_compute(config.compute, matmul=state.matmul if resumed_from else None))
    apply_compute(config.compute, matmul=state.matmul)
    if not resumed_from:
        task.prepare(state.model)
        if state.average is not None:
            # What was prepared may be weights: the average starts from them.
            state.average = WeightAverage(state.model, state.average.decay)
    first_step = state.step
    run_loop(
        task,
        state,
        plan=LoopPlan(schedule, config.global_batch_size, config.seed, config.precision, config.optim.clip_norm),
        group=group,
        batches=_batches(config, task, group, range(state.step, schedule.total_steps)),
        callbacks=_callbacks(config, task, group, publish),
    )
    return {**summarise(state.record()), "first_step": first_step, "seconds": round(time.monotonic() - started, 3)}


def load_trained(config: RunConfig, task: Task, url: str) -> tuple[nn.Module, dict[str, Any]]:
    """(model, summary) of a checkpoint, on the CPU; the weight average takes the weights' place if there is one."""
    files, record = read_checkpoint(url)
    identity_of(config, task).require(record)
    model = task.build_model()
    load_model(model, files["model"] | files.get("average", {}))
    return model, summarise(record)


def _batches(config: RunConfig, task: Task, group: Group, steps: range) -> Iterator[Sequence[Batch]]:
    """A generator, so that nothing is opened when no step is left."""
    yield from task.batches(
        steps=steps,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size or config.global_batch_size,
        group=group,
        loader_workers=config.compute.loader_workers,
    )


def _callbacks(config: RunConfig, task: Task, group: Group, publish: Publish) -> list[Callback]:
    """Every rank saves together; the first one also keeps the records."""
    output = absolute(config.output)
    extra = config.extra_callbacks(task, group)
    saving: list[Callback] = [
        OffendingBatch(join(output, "failed"), rank=group.rank, to_tensors=task.batch_tensors),
        Checkpointing(publish, every_steps=config.checkpoint.every_steps, rank=group.rank),
    ]
    if group.rank:
        return extra + saving
    records: list[Callback] = [
        MetricsFile(
            join(output, METRICS_NAME),
            every_steps=config.log_every_steps,
            checkpoint_steps=config.checkpoint.every_steps,
        ),
        Progress(),
        Tracking(config.tracking, every_steps=config.log_every_steps),
    ]
    return extra + records + saving
