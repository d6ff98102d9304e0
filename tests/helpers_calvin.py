"""A small table of CALVIN's form, scripted policies for it, and an evaluation that can be started in a process.

Light on purpose: every chain's process imports this file.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

import numpy as np

from evaluation.calvin.chains import read_chains
from evaluation.calvin.config import CalvinConfig
from evaluation.calvin.environment import World
from infra.errors import DataError

PRESSES = 3  # pushes that solve a task


class Table:
    """Counts pushes (first number above 0.5). As CALVIN's: strict about the gripper, scales the action in place."""

    def __init__(self, dies_at: int = 0, refuses_at: int = 0) -> None:
        self.pushes = self.steps = 0
        self.dies_at, self.refuses_at = dies_at, refuses_at

    def reset(self, robot_obs, scene_obs):
        assert robot_obs.shape == (15,)
        self.robot, self.scene = np.array(robot_obs), np.array(scene_obs)
        self.pushes = 0
        return self.get_obs()

    def get_obs(self):
        pictures = {
            "rgb_static": np.full((200, 200, 3), self.pushes, np.uint8),
            "rgb_gripper": np.full((84, 84, 3), self.steps % 256, np.uint8),
            "rgb_tactile": np.zeros((160, 120, 6), np.uint8),
        }
        return {"rgb_obs": pictures, "depth_obs": {}, "robot_obs": self.robot, "scene_obs": self.scene}

    def get_info(self):
        return {"pushes": self.pushes}

    def step(self, action):
        assert action.shape == (7,) and action[-1] in (-1, 1)
        self.steps += 1
        if self.steps == self.dies_at:
            os._exit(41)
        if self.steps == self.refuses_at:
            raise DataError("the table is sticky.", remedy="Wipe it.")
        self.pushes += int(action[0] > 0.5)
        action *= 0.02
        return self.get_obs(), 0, False, self.get_info()

    def close(self):
        self.pushes = -1


class PushOracle:
    def get_task_info_for_set(self, start_info, end_info, task_filter):
        return set(task_filter) if end_info["pushes"] - start_info["pushes"] >= PRESSES else set()


@dataclass(frozen=True)
class TableBenchmark:
    dies_at: int = 0
    refuses_at: int = 0
    without: tuple[str, ...] = ()
    name: str = "table"

    def sentences(self) -> dict[str, str]:
        return {task: task.replace("_", " ") for task in read_chains().tasks if task not in self.without}

    def facts(self) -> dict[str, str]:
        return {"scene": self.name}

    def build(self) -> World:
        return World(Table(self.dies_at, self.refuses_at), PushOracle())


@dataclass
class Scripted:
    """Solves the first so many tasks of each chain and then nothing."""

    lengths: dict[int, int]
    needs_images: bool = True
    action_horizon: int = 10
    digest: str = "0" * 64
    seen: list = field(default_factory=list)
    resets: list = field(default_factory=list)

    def reset(self, batch_size):
        if batch_size > 1:  # alone it is only being timed
            self.resets.append(batch_size)

    def act(self, observation):
        if len(observation.keys) > 1:
            self.seen.append(observation)
        chunk = np.zeros((len(observation.keys), self.action_horizon, 7), np.float32)
        chunk[..., -1] = 0.2  # neither open nor closed: the suite decides
        for row, key in enumerate(observation.keys):
            if key.startswith("chain/"):
                number, task = int(key.split("/")[1]), key.split("/")[2]
                place = read_chains().chains[number].tasks.index(task)
                chunk[row, :, 0] = float(place < self.lengths.get(number, 0))
        return chunk


@dataclass
class Keyed:
    """Chance decides: by the key, the number of the decision since the reset, and the picture."""

    needs_images: bool = True
    action_horizon: int = 4
    digest: str = "1" * 64
    decision: int = 0

    def reset(self, batch_size):
        self.decision = 0

    def act(self, observation):
        self.decision += 1
        chunk = np.zeros((len(observation.keys), self.action_horizon, 7), np.float32)
        for row, key in enumerate(observation.keys):
            picture = int(observation.images["gripper"][row, 0, 0, 0])
            name = hashlib.sha256(f"{key} {self.decision} {picture}".encode()).digest()
            chunk[row, :, 0] = np.random.default_rng(list(name[:8])).uniform(size=self.action_horizon) < 0.62
        return chunk


def small_config(output, **values) -> CalvinConfig:
    fields = {"sequences": 6, "max_steps": 7, "num_clips": 0, "processes": 0, "batch_size": 4}
    return CalvinConfig(policy="policy", calvin_root="none", output=str(output), **(fields | values))


def evaluate_in_child(output: str, fault: str) -> None:
    """The keyed policy on the table, to be killed at a fault point."""
    os.environ["FOREFRAME_FAULT"] = fault
    from evaluation.calvin.suite import evaluate

    evaluate(small_config(output), Keyed(), TableBenchmark())
