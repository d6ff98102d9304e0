"""What to roll out: the config of the closed-loop evaluation of a policy."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from infra.config import Config
from ingest.simulators.difficulty import LEVEL_OF_TASK
from ingest.simulators.metaworld import MAX_EPISODE_STEPS, check_camera, check_task

RANDOM_ACTIONS = "random-actions"
MEAN_DEMONSTRATION = "mean-demonstration"
PROPRIOCEPTION = "proprioception"
OTHER_EPISODE = "other-episode"
ORACLE = "oracle"
ArmName = Literal["random-actions", "mean-demonstration", "proprioception", "other-episode", "oracle"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
ALL_TASKS = "all"
ARM_NAME = re.compile(r"[a-z0-9]+([._-]+[a-z0-9]+)*")  # they name folders
PAPER_SEEDS = 25  # episodes a task
# Fields that say where and how quickly, not what.
PLACE_FIELDS = frozenset({"output", "workers"})


class RolloutsConfig(Config):
    """A policy and its control arms on `num_seeds` unseen seeds of each task; `tasks` "all" are Meta-World's 50.

    `policy` is an export, or the `ws://` address of one that is served. `camera` is what a policy knows as "main",
    `cameras` maps further names to the simulator's. `batch_size` episodes ask the policy together, in `workers`
    simulator processes; the number of processes changes no result. `proprioception_policy` is the export of a policy
    trained without pictures, `episodes` the data set the policy was trained on (its mean demonstration is one arm),
    `other_policies` further ones to report beside it, by name.
    """

    kind: Literal["rollouts"] = "rollouts"
    suite: str = "metaworld-rollouts"
    policy: str
    proprioception_policy: str = ""
    other_policies: dict[str, str] = Field(default_factory=dict)
    episodes: str = ""
    arms: tuple[ArmName, ...] = ARMS
    tasks: tuple[str, ...] = Field(min_length=1)
    first_seed: int = Field(default=10_000, ge=0)
    num_seeds: int = Field(default=20, ge=1)
    max_steps: int = Field(default=150, ge=1, le=MAX_EPISODE_STEPS)
    stop_on_success: bool = False  # True is quicker and leaves success at the last step unknown
    size: int = Field(default=128, ge=16, le=2048, multiple_of=2)
    camera: str = "corner4"
    cameras: dict[str, str] = Field(default_factory=dict)
    batch_size: int = Field(default=20, ge=1)
    num_clips: int = Field(default=1, ge=0)  # filmed episodes of each task and arm
    clip_stride: int = Field(default=2, ge=1)
    output: str
    workers: int = Field(default=2, ge=1)

    @field_validator("tasks", mode="before")
    @classmethod
    def _all_tasks(cls, tasks: Any) -> Any:
        return tuple(sorted(LEVEL_OF_TASK)) if tasks == ALL_TASKS else tasks

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_task(task) for task in dict.fromkeys(tasks))

    @field_validator("camera")
    @classmethod
    def _known_camera(cls, camera: str) -> str:
        return check_camera(camera)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for arm, field in ((PROPRIOCEPTION, "proprioception_policy"), (MEAN_DEMONSTRATION, "episodes")):
            if arm in self.arms and not getattr(self, field):
                raise ValueError(f"arm {arm!r} needs {field}; name it or leave the arm out")
        if OTHER_EPISODE in self.arms and min(len(seeds) for seeds in self.groups) < 2:
            raise ValueError(f"arm {OTHER_EPISODE!r} needs batches of at least 2; raise num_seeds or batch_size")
        if unfit := [name for name in self.other_policies if not ARM_NAME.fullmatch(name)]:
            raise ValueError(f"{unfit} name folders of clips; use lower-case letters, digits and '-', '_', '.' inside")
        if taken := set(self.other_policies) & {*ARMS, "policy"}:
            raise ValueError(f"{sorted(taken)} are names of control arms; name the other policies otherwise")
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every task, in order."""
        return tuple(range(self.first_seed, self.first_seed + self.num_seeds))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The seeds that ask a policy together: as few groups as `batch_size` allows, alike in size within one."""
        count = -(-self.num_seeds // self.batch_size)
        bounds = [self.num_seeds * number // count for number in range(count + 1)]
        return tuple(self.seeds[start:end] for start, end in pairwise(bounds))

    @property
    def num_rows(self) -> int:
        """Rows of every batch, the size of the largest group."""
        return max(len(seeds) for seeds in self.groups)


def metaworld50(policy: str, *, output: str, **changes: Any) -> RolloutsConfig:
    """One language-conditioned policy on all 50 tasks: 25 held-out seeds each, the full 500 steps, no control arm.

    Published results state neither camera, seeds nor horizon; these are ours, and success is told "ever" and "last".
    """
    wanted = {"tasks": ALL_TASKS, "num_seeds": PAPER_SEEDS, "max_steps": MAX_EPISODE_STEPS, "arms": ()}
    return RolloutsConfig.parse({"policy": policy, "output": output, **wanted, **changes})
