"""Plays episodes where their environments live: an action chunk comes in, and what is seen when it is done goes out.

Nothing is said between two decisions of the policy. This module loads no model: it runs in the simulators' processes.

Shape letters: B environments of this player, T steps of a chunk, A action.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from evaluation.rollouts.environments import Actions, BatchEnvironment, MakeEnvironment, Mask, Picture
from infra.faults import fault_point
from training.protocols import Observation


@dataclass(frozen=True)
class Rules:
    """When an episode ends, and how often its clip takes a picture.

    With `stop_on_success` an episode ends at its first success: quicker, and only success "ever" is known then.
    """

    max_steps: int
    stop_on_success: bool = False
    clip_stride: int = 2


@dataclass(frozen=True)
class Rollout:
    """One episode run by a policy.

    `steps` counts to the first success, or is the number run without one. `last` is the state after the last step of
    the full length; None where the episode ended at its first success, because then it would say nothing new.
    """

    seed: int
    ever: bool
    last: bool | None
    steps: int
    frames: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Scene:
    """The episodes of one player: `places[i]` is where `seeds[i]` stands among all that are played together."""

    task: str
    seeds: tuple[int, ...]
    places: tuple[int, ...]
    filmed: frozenset[int] = frozenset()  # seeds
    cameras: tuple[str, ...] = ()  # of the policy's observations; empty: it sees no picture


@dataclass
class Costs:
    """What the simulator took, in seconds of its process."""

    num_steps: int = 0
    step_s: float = 0.0
    num_pictures: int = 0
    render_s: float = 0.0


@dataclass(frozen=True)
class News:
    """What came of a call: `observation` of the episodes that go on, row by row of `places`, and those that ended."""

    places: tuple[int, ...]
    observation: Observation | None  # None when nothing goes on
    ended: tuple[Rollout, ...]
    action_dim: int
    costs: Costs


class Player:
    """Plays one scene after another; a scene of the same seeds keeps its environments."""

    def __init__(self, make: MakeEnvironment) -> None:
        self._make = make
        self._environment: BatchEnvironment | None = None
        self._scene: _Scene | None = None

    def start(self, scene: Scene, rules: Rules) -> News:
        """Begin the episodes and look at them."""
        environment = self._environment
        if environment is None or (environment.task, environment.seeds) != (scene.task, scene.seeds):
            self.close()
            environment = self._environment = self._make(scene.task, scene.seeds)
        environment.reset()
        self._scene = _Scene(environment, scene, rules)
        return self._scene.news()

    def advance(self, chunk_BTA: Actions | None, *, num_steps: int) -> News:
        """Execute `num_steps` of a chunk in the episodes that go on; without a chunk the scripted expert acts."""
        assert self._scene is not None, "start comes first"
        for step in range(num_steps):
            self._scene.advance(None if chunk_BTA is None else chunk_BTA[:, step])
        return self._scene.news()

    def close(self) -> None:
        """End the environments."""
        if self._environment is not None:
            self._environment.close()
            self._environment = self._scene = None


@dataclass
class _Scene:
    environment: BatchEnvironment
    scene: Scene
    rules: Rules
    step: int = 0
    active: Mask = field(init=False)
    last: Mask = field(init=False)
    first_success: npt.NDArray[np.int64] = field(init=False)  # steps taken when first solved, 0 for never

    def __post_init__(self) -> None:
        batch = len(self.scene.seeds)
        self.active, self.last = np.ones(batch, bool), np.zeros(batch, bool)
        self.first_success = np.zeros(batch, np.int64)
        self.told = np.zeros(batch, bool)  # whose end has been reported
        self.frames: dict[int, list[Picture]] = {
            index: [] for index, seed in enumerate(self.scene.seeds) if seed in self.scene.filmed
        }
        self.costs = Costs()

    def advance(self, actions_BA: Actions | None) -> None:
        """One step of every active environment."""
        if not self.active.any():
            return
        if self.step % self.rules.clip_stride == 0:
            self._film(self.active)
        began = time.perf_counter()
        if actions_BA is None:
            actions_BA = self.environment.expert_actions()
        success = self.environment.step(actions_BA, active=self.active)
        self.costs.step_s += time.perf_counter() - began
        self.costs.num_steps += int(self.active.sum())
        self.step += 1
        self.last = np.where(self.active, success, self.last)
        newly = success & (self.first_success == 0)
        self.first_success[newly] = self.step
        if self.rules.stop_on_success:
            self.active = self.active & ~success
        if self.step >= self.rules.max_steps:
            self.active = np.zeros_like(self.active)

    def news(self) -> News:
        """What is there to see and to tell since the last time."""
        fault_point("rollouts.in_player", self.scene.task)
        ended = ~self.active & ~self.told
        self.told |= ended
        self._film(ended)  # the final picture closes each clip
        rollouts = tuple(self._rollout(int(index)) for index in np.flatnonzero(ended))
        places = tuple(self.scene.places[index] for index in np.flatnonzero(self.active))
        observation = self._look() if places else None
        costs, self.costs = self.costs, Costs()
        return News(places, observation, rollouts, self.environment.action_dim, costs)

    def _look(self) -> Observation:
        """Only rows that go on."""
        cameras = self.scene.cameras
        began = time.perf_counter()
        seen = self.environment.observe(images=bool(cameras), active=self.active, cameras=cameras)
        if cameras:
            self.costs.render_s += time.perf_counter() - began
            self.costs.num_pictures += int(self.active.sum()) * len(cameras)
        return Observation(
            {camera: images[self.active] for camera, images in seen.images.items()},
            seen.proprioception[self.active],
            tuple(seen.text[index] for index in np.flatnonzero(self.active)),
        )

    def _rollout(self, index: int) -> Rollout:
        ever = bool(self.first_success[index])
        return Rollout(
            seed=self.scene.seeds[index],
            ever=ever,
            last=None if self.rules.stop_on_success else bool(self.last[index]),
            steps=int(self.first_success[index]) if ever else self.step,
            frames=tuple(self.frames.get(index, ())),
        )

    def _film(self, which: Mask) -> None:
        for index, frames in self.frames.items():
            if which[index]:
                frames.append(self.environment.picture(index))
