"""Control arms: policies that tell what a success rate is worth. All implement `training.protocols.Policy`.

Shape letters: B environments, T steps, A action, P proprioception.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from evaluation.rollouts.config import MEAN_DEMONSTRATION, ORACLE, OTHER_EPISODE, RANDOM_ACTIONS
from evaluation.rollouts.environments import Actions
from infra.digests import sha256_bytes
from infra.errors import ConfigError, DataError
from ingest.reader import ShardDataset
from ingest.schema import DEFAULT_CAMERA
from training.protocols import Observation, Policy

RANDOM_SALT = 1  # the simulator's own draws use the bare seed


class RandomActions:
    """Uniform actions in [-1, 1], drawn for each decision of an episode from its name."""

    needs_images = False
    digest = sha256_bytes(RANDOM_ACTIONS.encode())

    def __init__(self, *, action_dim: int, action_horizon: int = 4) -> None:
        self.action_horizon = action_horizon
        self._action_dim = action_dim
        self._decision = 0

    def reset(self, batch_size: int) -> None:
        """Start the same streams again."""
        self._decision = 0

    def act(self, observation: Observation) -> Actions:
        """-> (B, T, A), whatever is seen."""
        names = observation.keys or tuple(str(row) for row in range(len(observation.text)))
        seeds = [int(sha256_bytes(f"{name} {self._decision}".encode())[:16], 16) for name in names]
        self._decision += 1
        shape = (self.action_horizon, self._action_dim)
        drawn = [np.random.default_rng([RANDOM_SALT, seed]).uniform(-1.0, 1.0, shape) for seed in seeds]
        return np.stack(drawn).astype(np.float32)


class ReplayedActions:
    """One (T, A) action sequence replayed open loop in every environment; past its end the last action is held."""

    needs_images = False
    action_horizon = 1

    def __init__(self, actions_TA: Actions) -> None:
        if actions_TA.ndim != 2 or not len(actions_TA):
            raise DataError(f"actions to replay must be (T, A) with T > 0, not {actions_TA.shape}.")
        self._actions_TA = actions_TA.astype(np.float32)
        self.digest = sha256_bytes(self._actions_TA.tobytes())
        self._batch_size, self._step = 0, 0

    def reset(self, batch_size: int) -> None:
        """Back to the first action."""
        self._batch_size, self._step = batch_size, 0

    def act(self, observation: Observation) -> Actions:
        """-> (B, 1, A), whatever is seen."""
        action_A = self._actions_TA[min(self._step, len(self._actions_TA) - 1)]
        self._step += 1
        return np.broadcast_to(action_A, (self._batch_size, 1, len(action_A))).copy()


class Expert:
    """The scripted oracle, which sees the simulator's state: the ceiling. It acts where the simulator runs."""

    digest = sha256_bytes(ORACLE.encode())


class OtherEpisode:
    """A policy that is shown the pictures of the next environment of the batch, and feels its own body.

    What remains of its success does not come from seeing this episode.
    """

    needs_images = True

    def __init__(self, policy: Policy) -> None:
        if not policy.needs_images:
            raise ConfigError("a policy without pictures cannot be fed those of another episode.")
        self._policy = policy
        self.action_horizon = policy.action_horizon
        self.digest = policy.digest
        self.cameras = tuple(getattr(policy, "cameras", ())) or (str(getattr(policy, "camera", DEFAULT_CAMERA)),)

    def reset(self, batch_size: int) -> None:
        """As the policy's; a batch of one has no other episode."""
        if batch_size < 2:
            raise ConfigError(f"arm {OTHER_EPISODE!r} needs at least 2 seeds, not {batch_size}.")
        self._policy.reset(batch_size)

    def act(self, observation: Observation) -> npt.NDArray[np.float32]:
        """-> action chunk of the policy for the swapped pictures."""
        swapped = {camera: np.roll(images, -1, axis=0) for camera, images in observation.images.items()}
        return self._policy.act(replace(observation, images=swapped))


def mean_demonstrations(episodes: ShardDataset, tasks: tuple[str, ...]) -> dict[str, Actions]:
    """(T, A) mean action at each step over the training episodes of each task, as long as the longest of them.

    Shorter episodes leave the mean when they end. Raises `DataError` if a task has no episode.
    """
    found: dict[str, list[npt.NDArray[np.float64]]] = {task: [] for task in tasks}
    for index in range(len(episodes)):
        record = episodes.record(index)
        task = str(record.metadata.get("task") or record.label)
        if task in found:
            found[task].append(np.asarray(episodes.arrays(index)["actions"], np.float64))
    missing = [task for task, demonstrations in found.items() if not demonstrations]
    if missing:
        raise DataError(
            f"the episode data set has no demonstration of {', '.join(missing)}.",
            remedy=f"Leave {MEAN_DEMONSTRATION!r} out of the arms, or give the data set the policy was trained on.",
        )
    return {task: _mean_over_time(demonstrations) for task, demonstrations in found.items()}


def _mean_over_time(demonstrations: list[npt.NDArray[np.float64]]) -> Actions:
    longest = max(len(actions) for actions in demonstrations)
    total = np.zeros((longest, demonstrations[0].shape[1]))
    count = np.zeros((longest, 1))
    for actions in demonstrations:
        total[: len(actions)] += actions
        count[: len(actions)] += 1
    return (total / count).astype(np.float32)
