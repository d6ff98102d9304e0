"""An example of what runs beside a robot: ask a served policy, carry out its chunk at a steady rate, ask in time.

    python -m evaluation.serving.robot_loop ws://127.0.0.1:8765 --task drawer-open --seed 10000

The next chunk is asked for while the present one is still being carried out, `ahead` actions before its end. Until it
is there the robot holds its last action, at most `patience` control steps: a policy that has gone stops the robot.
Actions that a late chunk holds for times already gone by are dropped. Replace `Simulated` by your robot.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from evaluation.rollouts.environments import MetaWorldBatch
from evaluation.serving.client import TOKEN_VARIABLE, PolicyClient
from ingest.simulators.metaworld import CONTROL_HZ, prepare_rendering

log = logging.getLogger(__name__)
Action = npt.NDArray[np.float32]


class Robot(Protocol):
    """What the loop needs of a robot."""

    def observe(self) -> dict[str, Any]:
        """The observation to send."""
        ...

    def act(self, action: Action) -> bool:
        """Carry out one action; whether the task is done."""
        ...


@dataclass(frozen=True)
class LoopStats:
    """How an episode went: steps carried out, steps the robot waited for a chunk, actions dropped as too old."""

    done: bool
    steps: int
    held: int
    dropped: int


def control(
    robot: Robot,
    client: PolicyClient,
    *,
    rate_hz: float,
    max_steps: int,
    ahead: int = 1,
    patience: int = 20,
) -> LoopStats:
    """One episode at `rate_hz`. `ahead` 0 asks when the chunk is used up and so waits for every decision."""
    client.reset()
    with ThreadPoolExecutor(max_workers=1) as asking:
        chunk = list(client.infer(robot.observe())["actions"])
        answer: Future[Any] | None = None
        action, asked_at, held, waited, dropped = chunk[0], 0, 0, 0, 0
        due = time.perf_counter()
        for step in range(max_steps):
            if answer is None and len(chunk) <= ahead:
                answer, asked_at = asking.submit(client.infer, robot.observe()), step
            if not chunk and answer is not None:
                if waited >= patience or ahead == 0 or answer.done():
                    late, waited = step - asked_at, 0
                    received = list(answer.result()["actions"])  # raises what the connection raised
                    chunk, answer = received[late:] or received[-1:], None
                    dropped += len(received) - len(chunk)
                else:
                    held, waited = held + 1, waited + 1
            action = chunk.pop(0) if chunk else action
            if robot.act(action):
                return LoopStats(True, step + 1, held, dropped)
            # Time lost in waiting is lost: a robot must not be sent the missed steps at full speed.
            due = max(due + 1 / rate_hz, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
        return LoopStats(False, max_steps, held, dropped)


class Simulated:
    """A Meta-World arm in the place of a robot."""

    def __init__(self, task: str, seed: int, *, size: int = 128) -> None:
        self._environment = MetaWorldBatch(task, [seed], size=size)
        self._environment.reset()
        self._active = np.ones(1, bool)
        self._episode = f"{task}/{seed}"

    def observe(self) -> dict[str, Any]:
        """What `foreframe serve` expects."""
        seen = self._environment.observe(images=True, active=self._active)
        return {
            "observation/image": seen.images["main"][0],
            "observation/state": seen.proprioception[0],
            "prompt": seen.text[0],
            "episode": self._episode,
        }

    def act(self, action: Action) -> bool:
        """One control step."""
        return bool(self._environment.step(action[None], active=self._active)[0])

    def close(self) -> None:
        """Give the renderer back."""
        self._environment.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one simulated episode against a served policy."""
    parser = argparse.ArgumentParser(description="Drive a simulated arm with a served policy.")
    parser.add_argument("url")
    parser.add_argument("--task", default="drawer-open")
    parser.add_argument("--seed", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=CONTROL_HZ, help="control steps a second")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_rendering()
    robot = Simulated(given.task, given.seed)
    try:
        with PolicyClient(given.url, token=os.environ.get(TOKEN_VARIABLE, "")) as client:
            log.info("policy %s", client.metadata.get("policy"))
            stats = control(robot, client, rate_hz=given.rate, max_steps=given.steps)
    finally:
        robot.close()
    log.info(
        "%s after %d steps, %d held, %d dropped",
        "solved" if stats.done else "not solved",
        stats.steps,
        stats.held,
        stats.dropped,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
