"""What to evaluate on CALVIN: the config of the suite, and the numbers of the published protocol."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import Config

CHAIN_LENGTH = 5
NUM_CHAINS = 1_000
MAX_STEPS = 360  # environment steps for each subtask
CONTROL_HZ = 30
ACTION_DIM = 7  # three relative positions, three relative angles, gripper
STATE_DIM = 15
CAMERAS = {"static": "rgb_static", "gripper": "rgb_gripper"}  # our name -> CALVIN's
# Fields that say where and how quickly, not what.
PLACE_FIELDS = frozenset({"output", "calvin_root", "dataset", "processes"})


class CalvinConfig(Config):
    """A policy on the chains of CALVIN's long-horizon evaluation, environment D by default (ABC->D).

    `calvin_root` is the user's checkout of mees/calvin (or of calvin_env with the annotations beside it); nothing of
    it is part of this project. With `dataset` (a CALVIN data set folder) the environment is built from that data set's
    own record, as the official script does; without it, from the checkout's configuration for `scene`.
    """

    kind: Literal["calvin"] = "calvin"
    suite: str = "calvin"
    policy: str
    calvin_root: str
    dataset: str = ""
    scene: str = "calvin_scene_D"
    sequences: int = Field(default=NUM_CHAINS, ge=1, le=NUM_CHAINS)  # the first so many chains
    max_steps: int = Field(default=MAX_STEPS, ge=1)
    seed: int = Field(default=0, ge=0)  # of the policy's draws and of the bootstrap
    use_egl: bool = False  # the GPU renderer; False draws on the CPU
    num_clips: int = Field(default=4, ge=0)  # filmed chains, the first ones
    clip_stride: int = Field(default=4, ge=1)
    # Chains played at once, each in a process of its own; 0: one after another in this process, for a debugger.
    processes: int = Field(default=4, ge=0)
    # Rows of every call of the policy, filled up when fewer chains are played: so the numbers do not depend on
    # `processes`, down to rounding.
    batch_size: int = Field(default=4, ge=1)
    output: str

    @model_validator(mode="after")
    def _rows_suffice(self) -> Self:
        if self.processes > self.batch_size:
            raise ValueError(f"{self.processes} processes need a batch_size of at least {self.processes}")
        return self
