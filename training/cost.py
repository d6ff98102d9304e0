"""What a run would need on GPUs: memory of each, hours of all, and what these figures rest on.

Counted: parameters, operations and living bytes of one step, by running the real loss without storage
(`training.meta_step`). Assumed: how much of the peak rate is reached, and how a framework spends memory. Nothing here
was measured on a GPU. Formulas, with n trainable parameters, f frozen ones and g GPUs:

    replicated (DDP)   4 f + 4 n (weights + gradients + 2 moments [+ average]) + bf16 copies + activations
    sharded (FSDP2)    4 f + 4 n (the same) / g + what is gathered at once + activations
    gathered           working copies of the parameters outside blocks and of two blocks (the next one is fetched
                       while one computes), and one float32 gradient of the larger of these
    seconds of a step  clips of one GPU x operations of a clip / (peak rate x utilisation), each kind at its own rate

Peak rates are the dense figures of NVIDIA's data sheets (bf16 products with float32 sums, TF32, and float32 without
tensor cores): A100, H100 SXM, H200, L40S data sheets; RTX 4090: Ada architecture white paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator
from torch import nn

from infra.config import Config
from training.loop import Precision, Task
from training.meta_step import Arithmetic, StepCost, step_cost

FLOAT_BYTES, HALF_BYTES = 4, 2
ADAM_MOMENTS = 2
GIB = 1 << 30
USABLE_MEMORY = 0.92  # the rest: context, communication buffers, fragments


@dataclass(frozen=True)
class Gpu:
    """Data sheet figures; rates in TFLOP/s, dense."""

    memory_gib: int
    bf16: float
    tf32: float
    float32: float

    def seconds(self, flops: Mapping[Arithmetic, int]) -> float:
        """Time of so many operations of each kind at the peak rates."""
        rates = {"bf16": self.bf16, "tf32": self.tf32, "float32": self.float32}
        return sum(count / (1e12 * rates[kind]) for kind, count in flops.items())


GPUS: Mapping[str, Gpu] = {
    "A100-40GB": Gpu(40, bf16=312, tf32=156, float32=19.5),
    "A100-80GB": Gpu(80, bf16=312, tf32=156, float32=19.5),
    "H100-80GB": Gpu(80, bf16=989, tf32=494, float32=67),
    "H200-141GB": Gpu(141, bf16=989, tf32=494, float32=67),
    "L40S-48GB": Gpu(48, bf16=362, tf32=183, float32=91.6),
    "RTX4090-24GB": Gpu(24, bf16=165, tf32=82.6, float32=82.6),
}


class GpuPlan(Config):
    """The machines a dry run is asked about.

    `utilisation` is the share of the peak rate that all executed operations reach together. 0.35 is what well-kept
    trainings of transformers report; the one published figure for this video model (two to three days on eight A100,
    VPP) would be 0.13 to 0.19 if it means the 100,000 steps of 48 clips of the released weights.
    """

    gpu: str = "A100-80GB"
    num_gpus: int = Field(default=8, ge=1)
    utilisation: float = Field(default=0.35, gt=0, le=1)
    price_per_gpu_hour: float | None = Field(default=None, ge=0, description="in any currency; None: no price")

    @field_validator("gpu")
    @classmethod
    def _known(cls, gpu: str) -> str:
        if gpu not in GPUS:
            raise ValueError(f"unknown GPU; known: {', '.join(GPUS)}")
        return gpu

    @property
    def usable_bytes(self) -> int:
        """Memory of one GPU that a run can fill."""
        return int(GPUS[self.gpu].memory_gib * GIB * USABLE_MEMORY)

    def seconds_per_clip(self, cost: StepCost) -> float:
        """Time of one GPU for forward and backward of a clip."""
        return GPUS[self.gpu].seconds(cost.step_flops_by) / cost.num_clips / self.utilisation


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model. Blocks are the elements of its outermost module lists, which FSDP2 would shard singly."""

    trainable: int
    frozen: int  # buffers included
    largest_block: int  # trainable ones
    outside_blocks: int  # trainable ones

    @classmethod
    def of(cls, model: nn.Module) -> ParameterCounts:
        """Count; the model may be on the meta device."""
        trainable = _trainable(model)
        blocks = [_trainable(block) for block in _blocks(model)]
        everything = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        return cls(trainable, everything - trainable, max(blocks, default=0), trainable - sum(blocks))


def replicated_bytes(counts: ParameterCounts, cost: StepCost, *, averaged: bool) -> int:
    """Memory of one GPU when each holds everything."""
    return _fixed(counts, averaged) + FLOAT_BYTES * counts.frozen + cost.weight_copy_bytes + cost.peak_bytes


def sharded_bytes(
    counts: ParameterCounts, cost: StepCost, *, averaged: bool, num_gpus: int, precision: Precision
) -> int:
    """Memory of one GPU when weights, gradients and optimiser are cut into `num_gpus` parts."""
    working = HALF_BYTES if precision == "bf16" else FLOAT_BYTES
    gathered = working * (counts.outside_blocks + 2 * counts.largest_block)
    gradient = FLOAT_BYTES * max(counts.outside_blocks, counts.largest_block)
    share = math.ceil(_fixed(counts, averaged) / num_gpus)
    return share + FLOAT_BYTES * counts.frozen + gathered + gradient + cost.peak_bytes


def estimate(
    task: Task,
    model: nn.Module,
    plan: GpuPlan,
    *,
    precision: Precision,
    steps: int,
    global_batch_size: int,
    micro_batch_size: int | None,
    averaged: bool,
) -> dict[str, Any]:
    """Memory and hours of the run on these GPUs, without and (where the model has the switch) with checkpointing.

    `model` is on the meta device; its switch is left off. `describe_gpus` says the same in words.
    """
    counts = ParameterCounts.of(model)
    per_gpu = math.ceil(global_batch_size / plan.num_gpus)
    micro_batch = min(per_gpu, micro_batch_size or per_gpu)

    def variant() -> dict[str, Any]:
        cost = step_cost(task, model, precision, micro_batch)
        whole = replicated_bytes(counts, cost, averaged=averaged)
        part = sharded_bytes(counts, cost, averaged=averaged, num_gpus=plan.num_gpus, precision=precision)
        seconds = per_gpu * plan.seconds_per_clip(cost)
        return {
            **_work(cost),
            "replicated": _verdict(whole, cost, plan),
            "sharded": _verdict(part, cost, plan),
            **_duration(steps * seconds / 3600, plan),
            "seconds_per_step": seconds,
        }

    checkpointed = variant() if switch_checkpointing(model, True) else None
    switch_checkpointing(model, False)
    return {
        **plan.to_json(),
        "usable_bytes": plan.usable_bytes,
        "precision": precision,
        "clips_per_gpu": per_gpu,
        "micro_batch_clips": micro_batch,
        "trainable_parameters": counts.trainable,
        "frozen_parameters": counts.frozen,
        "largest_block_parameters": counts.largest_block,
        "without_checkpointing": variant(),
        "with_checkpointing": checkpointed,
        "rests_on": list(RESTS_ON),
    }


RESTS_ON = (
    "counted: parameters, and operations and living bytes of the real loss run forward and backward without storage",
    "assumed: the utilisation, no time for data and communication, attention by a fused kernel, "
    f"{1 - USABLE_MEMORY:.0%} of the memory for the libraries",
    "replicated is what a run does today (DDP); sharded is arithmetic for FSDP2 by blocks, not a run",
)


def switch_checkpointing(model: nn.Module, enabled: bool) -> bool:
    """Set a model's activation checkpointing; False if it has no such switch."""
    switch = getattr(model, "checkpoint_activations", None)
    if switch is None:
        return False
    switch(enabled)
    return True


def describe_gpus(estimated: Mapping[str, Any]) -> list[str]:
    """The estimate in lines for people."""
    lines = [
        f"on {estimated['num_gpus']} x {estimated['gpu']} at {estimated['utilisation']:.0%} of the peak rate, "
        f"{estimated['precision']}, {estimated['clips_per_gpu']} clips a step and GPU in passes of "
        f"{estimated['micro_batch_clips']}:"
    ]
    for name in ("without_checkpointing", "with_checkpointing"):
        variant = estimated[name]
        if variant is None:
            lines.append("  with checkpointing: this model has no such switch")
            continue
        chosen = " (as configured)" if estimated.get("configured") == name else ""
        price = "" if variant["price"] is None else f", price {variant['price']:,.0f}"
        lines.append(
            f"  {name.replace('_', ' ')}{chosen}: {variant['hours']:.1f} h "
            f"({variant['gpu_hours']:.0f} GPU hours{price}), "
            f"{variant['step_gflop_per_clip']:,.0f} GFLOP a clip; "
            f"memory of one GPU {_memory(variant, 'replicated')}, {_memory(variant, 'sharded')}"
        )
    return [*lines, *(f"  {reason}" for reason in estimated["rests_on"])]


def _memory(variant: Mapping[str, Any], layout: str) -> str:
    part = variant[layout]
    fits = "fits" if part["fits"] else f"too much, {part['clips_that_fit']} clips a pass would fit"
    return f"{part['bytes'] / 1e9:.1f} GB {layout} ({fits})"


def _work(cost: StepCost) -> dict[str, Any]:
    return {
        "forward_gflop_per_clip": cost.forward_flops / cost.num_clips / 1e9,
        "step_gflop_per_clip": cost.step_flops / cost.num_clips / 1e9,
        "of_these_gflop": {kind: count / cost.num_clips / 1e9 for kind, count in sorted(cost.step_flops_by.items())},
        "activation_bytes": cost.peak_bytes,
        "weight_copy_bytes": cost.weight_copy_bytes,
    }


def _duration(hours: float, plan: GpuPlan) -> dict[str, Any]:
    gpu_hours = hours * plan.num_gpus
    price = None if plan.price_per_gpu_hour is None else gpu_hours * plan.price_per_gpu_hour
    return {"hours": hours, "gpu_hours": gpu_hours, "price": price}


def _verdict(total: int, cost: StepCost, plan: GpuPlan) -> dict[str, Any]:
    """Whether it fits, and how many clips of a pass would: activations grow in proportion to clips."""
    room = plan.usable_bytes - (total - cost.peak_bytes)
    clips = max(0, math.floor(room * cost.num_clips / max(1, cost.peak_bytes)))
    return {"bytes": total, "fits": total <= plan.usable_bytes, "clips_that_fit": clips}


def _fixed(counts: ParameterCounts, averaged: bool) -> int:
    """Weights, gradients, moments and average of the trainable parameters, all float32."""
    return FLOAT_BYTES * counts.trainable * (2 + ADAM_MOMENTS + averaged)


def _trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
