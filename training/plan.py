"""What a run would do, without doing it: steps, epochs, parameters, memory, disk, and hours on GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from training.cost import ADAM_MOMENTS, FLOAT_BYTES, GpuPlan, describe_gpus, estimate, switch_checkpointing
from training.loop import Task
from training.meta_step import as_on_gpu
from training.session import RunConfig, schedule_of


def dry_run(config: RunConfig, gpus: GpuPlan | None = None) -> dict[str, Any]:
    """Counts and estimates of the run, from the config and the data set's manifest.

    The memory of one worker is weights, gradients, optimiser and average, plus what autograd would keep of one
    micro-batch: a model without storage is run on inputs without storage, so nothing is computed. `gpus` adds what
    the run would need there (see `training.cost`); a run that asks for GPUs is estimated for its own number of them.
    """
    task = config.build_task()
    schedule = schedule_of(config, task)
    with torch.device("meta"):
        model = task.build_model().to("meta")  # some modules make a tensor that ignores the context
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    stored = sum(tensor.numel() for tensor in model.state_dict().values())
    workers = max(1, config.compute.workers)
    per_rank = math.ceil(config.global_batch_size / workers)
    micro_batch = min(per_rank, config.micro_batch_size or per_rank)
    copies = 2 + ADAM_MOMENTS + (config.optim.ema_decay is not None)
    fixed = FLOAT_BYTES * (trainable * copies + frozen)
    checkpointed = bool(getattr(config, "checkpoint_activations", False))
    switch_checkpointing(model, checkpointed)
    activations = activation_bytes(task, model, config, micro_batch)
    checkpoint = FLOAT_BYTES * (stored + trainable * (copies - 2))
    if gpus is None and config.compute.use_gpu:
        gpus = GpuPlan(num_gpus=workers)
    plan: dict[str, Any] = {
        "run": config.run_name(),
        "clips": task.num_clips,
        "draws_per_clip": task.repeats,
        "steps": schedule.total_steps,
        "passes": schedule.passes(schedule.total_steps),
        "effective_epochs": schedule.passes(schedule.total_steps) * task.repeats,
        "clips_seen": schedule.total_steps * config.global_batch_size,
        "peak_lr": schedule.peak_lr,
        "workers": workers,
        "micro_batch_clips": micro_batch,
        "micro_batches_per_step": math.ceil(per_rank / micro_batch),
        "parameters": trainable,
        "worker_memory_bytes": {"model_and_optimiser": fixed, "activations": activations},
        "checkpoint_bytes": checkpoint,
        "disk_bytes": checkpoint * (config.checkpoint.keep + 1) + FLOAT_BYTES * stored,
    }
    if gpus is not None:
        plan["gpus"] = estimate(
            task,
            model,
            gpus,
            precision=config.precision,
            steps=schedule.total_steps,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            averaged=config.optim.ema_decay is not None,
        )
        plan["gpus"]["configured"] = "with_checkpointing" if checkpointed else "without_checkpointing"
    return plan


def activation_bytes(task: Task, model: nn.Module, config: RunConfig, num_clips: int) -> int:
    """Bytes that autograd keeps for the backward pass of `num_clips` clips; `model` lives on the meta device."""
    kept: dict[int, int] = {}
    weights = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            kept[id(base)] = base.numel() * base.element_size()
            alive.append(base)  # an id may be used again once its tensor is gone
        return tensor

    dialect = as_on_gpu(config.precision, fused_attention=config.compute.use_gpu)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), dialect:
        task.loss(model, task.example(num_clips), torch.device("meta"))
    return sum(kept.values())


def describe(plan: Mapping[str, Any]) -> str:
    """The plan in a few lines for people."""
    memory = plan["worker_memory_bytes"]
    lines = [
        f"{plan['run']}: {plan['steps']} steps of {plan['clips_seen'] // plan['steps']} clips, "
        f"{plan['passes']:.1f} passes over {plan['clips']} clips ({plan['effective_epochs']:.1f} effective epochs)",
        f"{plan['parameters'] / 1e6:.2f} M parameters, peak learning rate {plan['peak_lr']:.3g}",
        f"{plan['workers']} worker(s), each about {sum(memory.values()) / 1e9:.2f} GB above the libraries",
        f"about {plan['disk_bytes'] / 1e9:.2f} GB on disk",
    ]
    return "\n".join([*lines, *(describe_gpus(plan["gpus"]) if "gpus" in plan else [])])
