"""The rollout loop: all seeds of a task as one batch, one call of the policy per executed action chunk.

Shape letters: B environments, T executed steps of a chunk, A action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from evaluation.result import Item
from evaluation.rollouts.environments import Actions, BatchEnvironment, Mask
from infra.errors import DataError
from training.protocols import Policy

SUCCESS_EVER = "success_ever"
SUCCESS_LAST = "success_last"
STEPS = "steps"


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
    frames: tuple[npt.NDArray[np.uint8], ...] = ()

    def item(self, task: str) -> Item:
        """The record of `result.json`."""
        metrics = {SUCCESS_EVER: float(self.ever), STEPS: float(self.steps)}
        if self.last is not None:
            metrics[SUCCESS_LAST] = float(self.last)
        details = {"task": task, "seed": self.seed, "stopped_at_success": self.last is None}
        return Item(item_id=f"{task}/{self.seed}", stratum=task, metrics=metrics, details=details)


def run_batch(
    environment: BatchEnvironment,
    policy: Policy,
    *,
    max_steps: int,
    stop_on_success: bool = False,
    num_clips: int = 0,
    clip_stride: int = 2,
) -> list[Rollout]:
    """Roll a policy out on every seed of a batch.

    With `stop_on_success` an episode ends at its first success: quicker, and only success "ever" is known then.
    The first `num_clips` episodes keep every `clip_stride`-th frame. Raises `DataError` on a chunk of a wrong shape or
    with a value that is not finite.
    """
    environment.reset()
    policy.reset(len(environment.seeds))
    state = _State(environment, stop_on_success, num_clips, clip_stride)
    while state.step < max_steps and state.active.any():
        observation = environment.observe(images=policy.needs_images, active=state.active)
        chunk_BTA = _checked(policy.act(observation), environment)
        for actions_BA in np.moveaxis(chunk_BTA, 1, 0)[: max_steps - state.step]:
            state.advance(actions_BA)
    return state.rollouts()


@dataclass
class _State:
    environment: BatchEnvironment
    stop_on_success: bool
    num_clips: int
    clip_stride: int
    step: int = 0
    active: Mask = field(init=False)
    last: Mask = field(init=False)
    first_success: npt.NDArray[np.int64] = field(init=False)  # steps taken when first solved, 0 for never

    def __post_init__(self) -> None:
        batch = len(self.environment.seeds)
        self.active, self.last = np.ones(batch, bool), np.zeros(batch, bool)
        self.first_success = np.zeros(batch, np.int64)
        self.frames: list[list[npt.NDArray[np.uint8]]] = [[] for _ in range(min(self.num_clips, batch))]

    def advance(self, actions_BA: Actions) -> None:
        """One step of every active environment."""
        if not self.active.any():
            return
        if self.step % self.clip_stride == 0:
            self._film()
        success = self.environment.step(actions_BA, active=self.active)
        self.step += 1
        self.last = np.where(self.active, success, self.last)
        newly = success & (self.first_success == 0)
        self.first_success[newly] = self.step
        if self.stop_on_success:
            self.active = self.active & ~success

    def rollouts(self) -> list[Rollout]:
        """The records, in the order of the seeds; the final picture closes each clip."""
        self.active = np.ones_like(self.active)
        self._film()
        records = []
        for index, seed in enumerate(self.environment.seeds):
            ever = bool(self.first_success[index])
            last = None if self.stop_on_success else bool(self.last[index])
            steps = int(self.first_success[index]) if ever else self.step
            frames = tuple(self.frames[index]) if index < len(self.frames) else ()
            records.append(Rollout(seed, ever, last, steps, frames))
        return records

    def _film(self) -> None:
        for index, frames in enumerate(self.frames):
            if self.active[index]:
                frames.append(self.environment.picture(index))


def _checked(chunk: Actions, environment: BatchEnvironment) -> Actions:
    expected = (len(environment.seeds), environment.action_dim)
    if chunk.ndim != 3 or (chunk.shape[0], chunk.shape[2]) != expected or chunk.shape[1] < 1:
        raise DataError(
            f"the policy gave actions of shape {chunk.shape} on {environment.task!r}, "
            f"not ({expected[0]}, steps, {expected[1]}).",
            remedy="Is it a policy of this simulator?",
        )
    if not np.isfinite(chunk).all():
        raise DataError(f"the policy gave an action that is not finite on {environment.task!r}.")
    return chunk


def clip_fps(control_hz: int, clip_stride: int, *, speed: float = 0.5) -> float:
    """Frame rate of a clip shown at `speed` times real time."""
    return control_hz * speed / clip_stride


def items_of(rollouts: Sequence[Rollout], task: str) -> tuple[Item, ...]:
    """Records of one task, in the order of the seeds."""
    return tuple(rollout.item(task) for rollout in rollouts)
