"""Simulators behind one small interface: B episodes of one task that step together.

Shape letters: B environments, H height, W width, A action, P proprioception.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError
from ingest.schema import DEFAULT_CAMERA
from ingest.simulators.metaworld import ACTION_DIM, MetaWorldEnv, Renderer, check_task
from training.protocols import Images, Observation

Mask = npt.NDArray[np.bool_]
Actions = npt.NDArray[np.float32]


class BatchEnvironment(Protocol):
    """What the rollout loop needs of a simulator. A simulator is added by one class of this form."""

    task: str
    seeds: tuple[int, ...]
    action_dim: int

    def reset(self) -> None:
        """Start all B episodes, each a function of its seed."""
        ...

    def observe(self, *, images: bool, active: Mask) -> Observation:
        """All B at once. Environments that are not active show what they showed last; without `images` no picture."""
        ...

    def step(self, actions_BA: Actions, *, active: Mask) -> Mask:
        """Execute one step of the active ones -> (B,) whether each counts as solved now, False where not active."""
        ...

    def picture(self, index: int) -> npt.NDArray[np.uint8]:
        """(H, W, 3) of one environment, for a clip."""
        ...

    def expert_actions(self) -> Actions:
        """(B, A) what the scripted expert does now."""
        ...

    def close(self) -> None:
        """Give back what the operating system lent."""
        ...


class MetaWorldBatch:
    """B seeds of one Meta-World task, one renderer for all of them.

    The renderer starts with the first picture asked for: arms without eyes need no OpenGL.
    """

    action_dim = ACTION_DIM

    def __init__(self, task: str, seeds: Sequence[int], *, camera: str = "corner4", size: int = 128) -> None:
        self.task = check_task(task)
        self.seeds = tuple(seeds)
        if not self.seeds:
            raise ConfigError(f"no seed to roll out {task!r} on.", remedy="Set num_seeds to at least 1.")
        self._camera, self._size = camera, size
        self._renderer: Renderer | None = None
        self._environments = [MetaWorldEnv(task, seed) for seed in self.seeds]
        self._images_BHWC: Images = np.zeros((len(self.seeds), size, size, 3), np.uint8)

    def reset(self) -> None:
        """New episodes of the same seeds, equal to the last bit."""
        for env, seed in zip(self._environments, self.seeds, strict=True):
            env.reset(seed)
        self._images_BHWC = np.zeros_like(self._images_BHWC)

    def observe(self, *, images: bool, active: Mask) -> Observation:
        """See `BatchEnvironment.observe`."""
        pictures: dict[str, Images] = {}
        if images:
            for index in np.flatnonzero(active):
                self._images_BHWC[index] = self.picture(int(index))
            pictures[DEFAULT_CAMERA] = self._images_BHWC.copy()
        proprioception_BP = np.stack([env.proprioception for env in self._environments])
        return Observation(pictures, proprioception_BP, tuple(env.text for env in self._environments))

    def step(self, actions_BA: Actions, *, active: Mask) -> Mask:
        """See `BatchEnvironment.step`."""
        success_B = np.zeros(len(self.seeds), bool)
        for index in np.flatnonzero(active):
            success_B[index] = self._environments[index].step(actions_BA[index])
        return success_B

    def picture(self, index: int) -> npt.NDArray[np.uint8]:
        """See `BatchEnvironment.picture`."""
        if self._renderer is None:
            self._renderer = Renderer(self.task, camera=self._camera, size=self._size)
        return self._renderer.render(self._environments[index])

    def expert_actions(self) -> Actions:
        """See `BatchEnvironment.expert_actions`."""
        return np.stack([env.oracle_action() for env in self._environments])

    def close(self) -> None:
        """See `BatchEnvironment.close`."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
