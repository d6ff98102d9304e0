"""What to simulate: the config of a corpus of demonstrations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from infra.config import Config
from infra.digests import sha256_json
from ingest.simulators.metaworld import CONTROL_HZ, MAX_EPISODE_STEPS, RenderFlags, check_camera, check_task
from ingest.simulators.sentences import TASKS

# What decides one episode's bytes; the rest says how many there are, where they go and who makes them.
EPISODE_FIELDS = ("camera", "size", "goal_marker", "noise", "keep_after_success", "max_steps", "fps", "crf", "gop")
PLACE_FIELDS = frozenset({"output", "workers"})

GoalMarker = Literal["auto", "hidden", "visible"]


class SimulateConfig(Config):
    """Demonstrations of the scripted oracles: `episodes` successes of each task, from `first_seed` upwards.

    `tasks` are names, or "all" alone for the fifty of them.

    `noise` is the standard deviation of the Gaussian added to the executed xyz of the action (the label stays clean);
    `keep_after_success` frames follow the first success; a seed without success within `max_steps` is passed over.
    `goal_marker` "auto" draws the dot at the target in the tasks whose goal nothing else shows; "hidden" never draws
    it, so that tasks of one scene look alike and only their sentence tells them apart; "visible" draws it wherever a
    task has one.
    """

    kind: Literal["simulate"] = "simulate"
    output: str
    tasks: tuple[str, ...] = Field(min_length=1)
    episodes: int = Field(default=25, ge=1)
    first_seed: int = Field(default=0, ge=0)
    camera: str = "corner4"
    size: int = Field(default=128, ge=16, le=2048, multiple_of=2)  # H.264 stores even sides only
    goal_marker: GoalMarker = "auto"
    noise: float = Field(default=0.3, ge=0.0)
    keep_after_success: int = Field(default=3, ge=0)
    max_steps: int = Field(default=200, ge=1, le=MAX_EPISODE_STEPS)
    fps: int = Field(default=CONTROL_HZ, ge=1)
    crf: int = Field(default=12, ge=0, le=51)  # low: the pictures a policy learns from stay close to the rendered ones
    gop: int = Field(default=8, ge=1)
    damage: bool = False  # plant broken videos among the good ones
    damage_seed: int = Field(default=0, ge=0)
    workers: int = Field(default=2, ge=1)

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if tasks == ("all",):
            return TASKS
        if len(set(tasks)) != len(tasks):
            raise ValueError(f"a task is named twice in {tasks}")
        return tuple(check_task(task) for task in tasks)

    @field_validator("camera")
    @classmethod
    def _known_camera(cls, camera: str) -> str:
        return check_camera(camera)

    def render_flags(self, task: str) -> RenderFlags:
        """What the pictures of this task show; recorded beside every episode."""
        if self.goal_marker == "auto":
            return RenderFlags.for_task(task)
        return RenderFlags(goal_marker=self.goal_marker == "visible")

    def episode_digest(self) -> str:
        """Identity of how one episode is made."""
        values = self.to_json()
        return sha256_json({name: values[name] for name in EPISODE_FIELDS})
