"""How long a policy takes: every decision of the rollouts, and single observations as a robot asks them.

`latency.json` lies beside `result.json`, which does not hold it: two runs of one evaluation give one result and two
latencies. All times are wall seconds; those of the simulator are of its own processes.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from evaluation.rollouts.player import Costs
from training.protocols import Observation, Policy

LATENCY_NAME = "latency.json"
SCHEMA_VERSION = 1
# Upper bounds of the histogram's bins in seconds; one more bin holds what is slower.
BOUNDS_S = tuple(value * 10.0**power for power in range(-4, 2) for value in (1.0, 2.0, 5.0)) + (100.0,)
NUM_REPEATS = 20
MAX_MEASURING_S = 20.0


@dataclass
class ArmTimings:
    """Times of one arm, summed up over batches."""

    batch_size: int = 0  # rows of each decision
    decision_s: list[float] = field(default_factory=list)
    num_control_steps: int = 0  # executed actions of a row, summed over the decisions
    parts_s: dict[str, float] = field(default_factory=dict)  # sums of `Policy.timings`
    costs: Costs = field(default_factory=Costs)
    wall_s: float = 0.0

    def add_decision(self, seconds: float, policy: Policy, *, batch_size: int) -> None:
        """One `act`, and the parts that the policy measured itself."""
        self.batch_size = batch_size
        self.decision_s.append(seconds)
        for name, part_s in getattr(policy, "timings", {}).items():
            self.parts_s[name] = self.parts_s.get(name, 0.0) + float(part_s)

    def add_costs(self, costs: Costs) -> None:
        """What the simulator took."""
        for name, value in asdict(costs).items():
            setattr(self.costs, name, getattr(self.costs, name) + value)

    def add(self, other: ArmTimings) -> None:
        """Join what another batch or an earlier run took."""
        self.batch_size = max(self.batch_size, other.batch_size)
        self.decision_s += other.decision_s
        self.num_control_steps += other.num_control_steps
        self.wall_s += other.wall_s
        for name, part_s in other.parts_s.items():
            self.parts_s[name] = self.parts_s.get(name, 0.0) + part_s
        self.add_costs(other.costs)

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes it again."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ArmTimings:
        """What `to_json` gave."""
        return cls(**{**value, "costs": Costs(**value["costs"])})

    def summary(self) -> dict[str, Any]:
        """The arm's entry of `latency.json`; without a decision (the oracle) only what the simulator took."""
        costs = self.costs
        entry: dict[str, Any] = {
            "num_decisions": len(self.decision_s),
            "environment": {
                "num_steps": costs.num_steps,
                "step_s": _ratio(costs.step_s, costs.num_steps),
                "num_pictures": costs.num_pictures,
                "picture_s": _ratio(costs.render_s, costs.num_pictures),
            },
            "wall_s": self.wall_s,
            "episode_steps_per_s": _ratio(costs.num_steps, self.wall_s),
        }
        if not self.decision_s:
            return entry
        total_s = sum(self.decision_s)
        return entry | {
            "batch_size": self.batch_size,
            "decision_s": _quantiles(self.decision_s),
            "histogram": histogram(self.decision_s),
            "parts_s": {name: part_s / len(self.decision_s) for name, part_s in self.parts_s.items()},
            "control_step_s": _ratio(total_s, self.num_control_steps),
            "control_hz": _ratio(self.num_control_steps, total_s),
        }


def histogram(seconds: list[float]) -> dict[str, list[float] | list[int]]:
    """Counts by upper bound; the last count is of what exceeds every bound."""
    counts = [0] * (len(BOUNDS_S) + 1)
    for value in seconds:
        counts[bisect_left(BOUNDS_S, value)] += 1
    return {"upper_bounds_s": list(BOUNDS_S), "counts": counts}


def measure_single(policy: Policy, observation: Observation) -> dict[str, Any]:
    """One observation at a time, as a robot asks: after one call to warm up, `NUM_REPEATS` or `MAX_MEASURING_S`."""
    timings = ArmTimings()
    policy.reset(1)
    chunk = policy.act(observation)
    while len(timings.decision_s) < NUM_REPEATS and (not timings.decision_s or sum(timings.decision_s) < MAX_MEASURING_S):
        began = time.perf_counter()
        chunk = policy.act(observation)
        timings.add_decision(time.perf_counter() - began, policy, batch_size=1)
        timings.num_control_steps += chunk.shape[1]
    entry, quantiles = timings.summary(), _quantiles(timings.decision_s)
    return {
        "batch_size": 1,
        "num_decisions": len(timings.decision_s),
        "actions_per_decision": chunk.shape[1],
        **quantiles,
        "parts_s": entry["parts_s"],
        "control_hz": _ratio(chunk.shape[1], quantiles["median_s"]),
    }


def latency_report(
    arms: Mapping[str, ArmTimings], singles: Mapping[str, dict[str, Any]], *, model: str
) -> dict[str, Any]:
    """The content of `latency.json`: `single` is the rated policy's, `arms` has every arm with its own."""
    entries = {name: timings.summary() for name, timings in arms.items()}
    for name, single in singles.items():
        entries[name] = entries.get(name, {}) | {"single": single}
    return {
        "schema_version": SCHEMA_VERSION,
        "num_threads": torch.get_num_threads(),
        "single": singles[model],
        "arms": entries,
    }


def _quantiles(seconds: list[float]) -> dict[str, float]:
    values = np.asarray(seconds)
    return {
        "mean_s": float(values.mean()),
        "median_s": float(np.median(values)),
        "p95_s": float(np.quantile(values, 0.95)),
        "max_s": float(values.max()),
    }


def _ratio(value: float, by: float) -> float | None:
    return value / by if by else None
