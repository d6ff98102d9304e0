"""Simulators behind one small interface: B episodes of one task that step together.

Shape letters: B environments, H height, W width, A action, P proprioception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError
from ingest.schema import DEFAULT_CAMERA
from ingest.simulators.metaworld import ACTION_DIM, MetaWorldEnv, Renderer, check_task, prepare_rendering
from training.protocols import Observation

Mask = npt.NDArray[np.bool_]
Actions = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]


class BatchEnvironment(Protocol):
    """What a rollout needs of a simulator. A simulator is added by one class of this form."""

    task: str
    seeds: tuple[int, ...]
    action_dim: int

    def reset(self) -> None:
        """Start all B episodes, each a function of its seed."""
        ...

    def observe(self, *, images: bool, active: Mask, cameras: Sequence[str] | None = None) -> Observation:
        """All B at once. Environments that are not active show what they showed last; without `images` no picture.

        `cameras` chooses among the environment's own; None: all of them.
        """
        ...

    def step(self, actions_BA: Actions, *, active: Mask) -> Mask:
        """Execute one step of the active ones -> (B,) whether each counts as solved now, False where not active."""
        ...

    def picture(self, index: int) -> Picture:
        """(H, W, 3) of one environment, for a clip."""
        ...

    def expert_actions(self) -> Actions:
        """(B, A) what the scripted expert does now."""
        ...

    def close(self) -> None:
        """Give back what the operating system lent."""
        ...


class MakeEnvironment(Protocol):
    """Makes the environment of some seeds of a task; pickles, for environments may live in other processes."""

    def __call__(self, task: str, seeds: tuple[int, ...]) -> BatchEnvironment:
        """A new environment; its caller closes it."""
        ...


class MetaWorldBatch:
    """B seeds of one Meta-World task, one renderer a camera for all of them.

    A renderer starts with the first picture asked for: arms without eyes need no OpenGL. `cameras` maps further names
    to Meta-World's cameras; "main" is `camera`.
    """

    action_dim = ACTION_DIM

    def __init__(
        self,
        task: str,
        seeds: Sequence[int],
        *,
        camera: str = "corner4",
        size: int = 128,
        cameras: Mapping[str, str] | None = None,
    ) -> None:
        self.task = check_task(task)
        self.seeds = tuple(seeds)
        if not self.seeds:
            raise ConfigError(f"no seed to roll out {task!r} on.", remedy="Set num_seeds to at least 1.")
        self.cameras = {DEFAULT_CAMERA: camera, **(cameras or {})}
        self._size = size
        self._renderers: dict[str, Renderer] = {}
        self._environments = [MetaWorldEnv(task, seed) for seed in self.seeds]
        self._shown: dict[tuple[str, int], tuple[int, Picture]] = {}  # the step each was drawn at, and the picture

    def reset(self) -> None:
        """New episodes of the same seeds, equal to the last bit."""
        for env, seed in zip(self._environments, self.seeds, strict=True):
            env.reset(seed)
        self._shown.clear()

    def observe(self, *, images: bool, active: Mask, cameras: Sequence[str] | None = None) -> Observation:
        """See `BatchEnvironment.observe`."""
        wanted = tuple(self.cameras if cameras is None else cameras) if images else ()
        for camera in wanted:
            for index in np.flatnonzero(active):
                self.picture(int(index), camera=camera)
        return Observation(
            {camera: np.stack([self._last(camera, index) for index in range(len(self.seeds))]) for camera in wanted},
            np.stack([env.proprioception for env in self._environments]),
            tuple(env.text for env in self._environments),
            tuple(f"{self.task}/{seed}" for seed in self.seeds),
        )

    def step(self, actions_BA: Actions, *, active: Mask) -> Mask:
        """See `BatchEnvironment.step`."""
        success_B = np.zeros(len(self.seeds), bool)
        for index in np.flatnonzero(active):
            success_B[index] = self._environments[index].step(actions_BA[index])
        return success_B

    def picture(self, index: int, *, camera: str = DEFAULT_CAMERA) -> Picture:
        """See `BatchEnvironment.picture`; drawn once a step."""
        env = self._environments[index]
        steps, picture = self._shown.get((camera, index), (None, None))
        if picture is None or steps != env.steps:
            picture = self._renderer(camera).render(env)
            self._shown[camera, index] = env.steps, picture
        return picture

    def expert_actions(self) -> Actions:
        """See `BatchEnvironment.expert_actions`."""
        return np.stack([env.oracle_action() for env in self._environments])

    def close(self) -> None:
        """See `BatchEnvironment.close`."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _renderer(self, camera: str) -> Renderer:
        if camera not in self.cameras:
            raise ConfigError(
                f"the policy looks through camera {camera!r}, which these rollouts do not have.",
                remedy=f'Map it to one of the simulator\'s: cameras={{"{camera}": "corner2"}}.',
            )
        if camera not in self._renderers:
            self._renderers[camera] = Renderer(self.task, camera=self.cameras[camera], size=self._size)
        return self._renderers[camera]

    def _last(self, camera: str, index: int) -> Picture:
        if (camera, index) in self._shown:
            return self._shown[camera, index][1]
        return np.zeros((self._size, self._size, 3), np.uint8)


@dataclass(frozen=True)
class MakeMetaWorld:
    """Makes `MetaWorldBatch`es. `trains_here` where torch computes in the same process: it must be loaded first."""

    camera: str
    size: int
    cameras: Mapping[str, str]
    trains_here: bool

    def __call__(self, task: str, seeds: tuple[int, ...]) -> BatchEnvironment:
        """See `MakeEnvironment`."""
        prepare_rendering(torch_first=self.trains_here)
        return MetaWorldBatch(task, seeds, camera=self.camera, size=self.size, cameras=self.cameras)
