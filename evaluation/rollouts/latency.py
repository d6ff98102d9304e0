"""How long decisions take: `latency.json` beside a result. Nothing hashes it: times differ from run to run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evaluation.rollouts.player import Costs
from training.protocols import Observation, Policy

LATENCY_NAME = "latency.json"
EDGES_MS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
SINGLE_REPEATS = 9


@dataclass
class ArmTimings:
    """One arm's times in this execution; an evaluation that resumed tells of what it did itself."""

    decisions_s: list[float] = field(default_factory=list)
    parts_s: dict[str, float] = field(default_factory=dict)
    batch_size: int = 0
    num_control_steps: int = 0  # of the batch
    wall_s: float = 0.0
    costs: Costs = field(default_factory=Costs)

    def add_decision(self, seconds: float, policy: Policy, *, batch_size: int) -> None:
        """One call of the policy, with the parts it tells of."""
        self.decisions_s.append(seconds)
        self.batch_size = batch_size
        for part, share in getattr(policy, "timings", {}).items():
            self.parts_s[part] = self.parts_s.get(part, 0.0) + share

    def add_costs(self, costs: Costs) -> None:
        """What the simulator took."""
        for name, value in vars(costs).items():
            setattr(self.costs, name, getattr(self.costs, name) + value)

    def record(self) -> dict[str, Any]:
        """As `latency.json` has it; the control frequency is that of one robot whose steps nothing else delays."""
        count, costs = len(self.decisions_s), self.costs
        record: dict[str, Any] = {
            "decisions": count,
            "batch_size": self.batch_size,
            "control_steps": self.num_control_steps,
            "wall_s": round(self.wall_s, 3),
            "environment_step_ms": _mean_ms(costs.step_s, costs.num_steps),
            "picture_ms": _mean_ms(costs.render_s, costs.num_pictures),
        }
        if count:
            record |= spread(self.decisions_s)
            record["parts_ms"] = {part: _mean_ms(total, count) for part, total in self.parts_s.items()}
            record["ms_per_control_step"] = _mean_ms(sum(self.decisions_s), self.num_control_steps)
        return record


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, mean, 95th percentile, greatest, and a histogram over fixed edges."""
    times = np.asarray(seconds)
    counts, _ = np.histogram(np.minimum(1e3 * times, EDGES_MS[-1]), EDGES_MS)
    return {
        "median_s": float(np.median(times)),
        "mean_s": float(times.mean()),
        "p95_s": float(np.percentile(times, 95)),
        "max_s": float(times.max()),
        "histogram": {"edges_ms": list(EDGES_MS), "counts": counts.tolist()},
    }


def single(policy: Policy, observation: Observation, *, repeats: int = SINGLE_REPEATS) -> dict[str, Any]:
    """One observation at a time, as a robot asks: the first decision, which loads and compiles, is left out."""
    alone = first_row(observation)
    timings = ArmTimings()
    policy.reset(1)
    horizon = int(policy.act(alone).shape[1])
    for _ in range(repeats):
        began = time.perf_counter()
        policy.act(alone)
        timings.add_decision(time.perf_counter() - began, policy, batch_size=1)
    parts = {part: _mean_ms(total, repeats) for part, total in timings.parts_s.items()}
    found = spread(timings.decisions_s)
    rates = {"actions_per_decision": horizon, "control_hz": horizon / found["median_s"]}
    return {**found, "parts_ms": parts, **rates}


def in_words(alone: dict[str, Any]) -> str:
    """What `single` found, as a sentence for the log."""
    parts = ", ".join(f"{part} {milliseconds:.1f}" for part, milliseconds in alone["parts_ms"].items())
    return (
        f"one robot waits {1e3 * alone['median_s']:.1f} ms for a decision{f' ({parts})' if parts else ''} "
        f"of {alone['actions_per_decision']} actions: {alone['control_hz']:.0f} actions a second"
    )


def first_row(observation: Observation) -> Observation:
    """The first of several environments."""
    return replace(
        observation,
        images={camera: images[:1] for camera, images in observation.images.items()},
        proprioception=observation.proprioception[:1],
        text=observation.text[:1],
        keys=observation.keys[:1],
    )


def _mean_ms(total_s: float, count: int) -> float:
    return round(1e3 * total_s / count, 3) if count else 0.0
