"""What to roll out: the config of the closed-loop evaluation of a policy."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from infra.config import Config
from ingest.simulators.metaworld import MAX_EPISODE_STEPS, check_camera, check_task

RANDOM_ACTIONS = "random-actions"
MEAN_DEMONSTRATION = "mean-demonstration"
PROPRIOCEPTION = "proprioception"
OTHER_EPISODE = "other-episode"
ORACLE = "oracle"
ArmName = Literal["random-actions", "mean-demonstration", "proprioception", "other-episode", "oracle"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
# Fields that say where and how quickly, not what.
PLACE_FIELDS = frozenset({"output", "workers"})


class RolloutsConfig(Config):
    """A policy and its control arms on `num_seeds` unseen seeds of each task.

    `proprioception_policy` is the export of a policy trained without pictures, `episodes` the data set the policy was
    trained on (its mean demonstration is one arm), `other_policies` further exports to report beside it, by name.
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
    num_clips: int = Field(default=1, ge=0)  # filmed episodes of each task and arm
    clip_stride: int = Field(default=2, ge=1)
    output: str
    workers: int = Field(default=2, ge=1)

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
        if OTHER_EPISODE in self.arms and self.num_seeds < 2:
            raise ValueError(f"arm {OTHER_EPISODE!r} needs num_seeds of at least 2")
        if taken := set(self.other_policies) & {*ARMS, "policy"}:
            raise ValueError(f"{sorted(taken)} are names of control arms; name the other policies otherwise")
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every task, in order."""
        return tuple(range(self.first_seed, self.first_seed + self.num_seeds))
