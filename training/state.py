"""What a run remembers: weights, optimiser, weight average, step, and a record of where it came from.

There is no random state to save. Every draw is keyed by counters (seed, step, rank) or (seed, epoch, clip, draw), so
the step *is* the state of the random numbers, for any number of ranks.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from infra.compute import MatmulLibrary
from infra.errors import CheckpointError
from training.optim import WeightAverage

STATE_VERSION = 1
TAIL_STEPS = 100


@dataclass(frozen=True)
class Identity:
    """What must agree before a checkpoint may be continued."""

    config_digest: str
    data_digest: str
    seed: int

    def require(self, record: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` unless the record of a checkpoint is of this run."""
        expected = {"version": STATE_VERSION, "config_digest": self.config_digest, "data_digest": self.data_digest}
        for key, value in expected.items():
            if record.get(key) != value:
                raise CheckpointError(
                    f"the checkpoint's {key} is {record.get(key)!r}, this run's is {value!r}.",
                    remedy="Use another output folder for another config or data set.",
                )


@dataclass
class TrainState:
    """One run at one step. `step` counts finished updates; `tail` holds the metrics of the latest ones."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    identity: Identity
    average: WeightAverage | None = None
    step: int = 0
    first: dict[str, float] = field(default_factory=dict)
    tail: list[dict[str, float]] = field(default_factory=list)
    matmul: MatmulLibrary = "default"

    def advance(self, metrics: Mapping[str, float]) -> None:
        """Count one finished update and remember its metrics."""
        self.step += 1
        self.first = self.first or dict(metrics)
        self.tail = [*self.tail, dict(metrics)][-TAIL_STEPS:]

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint: one mapping per file, detached, on the CPU."""
        files = {"model": _to_cpu(self.model.state_dict()), "optimizer": _to_cpu(self._optimizer_tensors())}
        if self.average is not None:
            files["average"] = _to_cpu(self.average.weights)
        return files

    def record(self) -> dict[str, Any]:
        """The JSON side of a checkpoint."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "config_digest": self.identity.config_digest,
            "data_digest": self.identity.data_digest,
            "random": {"rule": "counter", "seed": self.identity.seed, "step": self.step},
            "matmul": self.matmul,
            "first": self.first,
            "tail": self.tail,
        }

    def restore(self, files: Mapping[str, Mapping[str, torch.Tensor]], record: Mapping[str, Any]) -> None:
        """Take over a checkpoint; `CheckpointError` when it belongs to another run or another model."""
        self.identity.require(record)
        load_model(self.model, files["model"])
        self._restore_optimizer(files["optimizer"])
        if self.average is not None:
            stored = files.get("average", {})
            _require_same_shapes("weight average", stored, self.average.weights)
            for name, weight in self.average.weights.items():
                weight.copy_(stored[name])
        self.step = int(record["step"])
        self.first = dict(record["first"])
        self.tail = [dict(item) for item in record["tail"]]
        self.matmul = record["matmul"]

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        names = self._names()
        return {
            f"{names[parameter]}/{key}": torch.as_tensor(value)
            for parameter, slots in self.optimizer.state.items()
            for key, value in slots.items()
        }

    def _restore_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        by_name = {name: parameter for parameter, name in self._names().items()}
        self.optimizer.state.clear()
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition("/")
            if name not in by_name:
                raise CheckpointError(f"the checkpoint's optimiser knows {name!r}, which this model does not have.")
            parameter = by_name[name]
            self.optimizer.state.setdefault(parameter, {})[key] = tensor.to(parameter.device, copy=True)


def load_model(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy the weights of a checkpoint; `CheckpointError` when they are of another model."""
    _require_same_shapes("model", weights, model.state_dict())
    model.load_state_dict(dict(weights), strict=True)


def summarise(record: Mapping[str, Any], *, num_steps: int = 50) -> dict[str, Any]:
    """What a run achieved, from a checkpoint's record: metrics of the first step and means over the latest ones."""
    recent = record["tail"][-num_steps:]
    last = {name: statistics.fmean(item[name] for item in recent) for name in (recent[-1] if recent else {})}
    return {"steps": record["step"], "first": record["first"], "last": last, "matmul": record["matmul"]}


def counter_seed(*counters: int | str) -> int:
    """A 63-bit seed that is a pure function of the counters, e.g. (seed, "step", step, rank)."""
    text = "/".join(str(counter) for counter in counters)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _to_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}


def _require_same_shapes(what: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    found_shapes, expected_shapes = ({(k, tuple(v.shape)) for k, v in tensors.items()} for tensors in (found, expected))
    if found_shapes != expected_shapes:
        missing, extra = sorted(expected_shapes - found_shapes)[:3], sorted(found_shapes - expected_shapes)[:3]
        raise CheckpointError(
            f"the checkpoint's {what} does not fit: missing {missing}, unexpected {extra}.",
            remedy="It belongs to another model configuration.",
        )
