"""One robot's connection: its messages checked against what the policy looks at, and its own episode.

Keys of an observation, as openpi's clients send them: `observation/image` (the first camera) or
`observation/images/CAMERA`, uint8 (H, W, 3); `observation/state`, (P,) numbers; `prompt`, a sentence. Ours besides:
`reset`, true for the first observation of an episode, and `episode`, its name, from which random draws follow.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from training.protocols import Observation, Policy

IMAGE, IMAGES, STATE, PROMPT, RESET, EPISODE = (
    "observation/image", "observation/images/", "observation/state", "prompt", "reset", "episode",
)  # fmt: skip
MAX_SIDE, MAX_STATE, MAX_TEXT = 4096, 1024, 1000


class ObservationError(ValueError):
    """What is wrong with an observation, in one line for the peer."""


@dataclass(frozen=True)
class ObservationSchema:
    """What a policy looks at. `state_dim` 0: not known, any width is passed on."""

    cameras: tuple[str, ...]
    state_dim: int = 0
    default_prompt: str = ""

    def parse(self, message: Any) -> tuple[Observation, bool]:
        """(observation of a batch of one, whether a new episode begins); `ObservationError` names the key at fault."""
        if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
            raise ObservationError("an observation is a map with text keys")
        images = {camera: self._image(message, camera, first=not place) for place, camera in enumerate(self.cameras)}
        prompt = message.get(PROMPT, self.default_prompt)
        if not isinstance(prompt, str) or not prompt or len(prompt) > MAX_TEXT:
            raise ObservationError(f"{PROMPT!r} must be a sentence of 1 to {MAX_TEXT} characters")
        reset, episode = message.get(RESET, False), message.get(EPISODE, "")
        if not isinstance(reset, bool) or not isinstance(episode, str) or len(episode) > MAX_TEXT:
            raise ObservationError(f"{RESET!r} must be true or false, {EPISODE!r} a name")
        return Observation(images, self._state(message), (prompt,), (episode,) if episode else ()), reset

    def _image(self, message: Mapping[str, Any], camera: str, *, first: bool) -> npt.NDArray[np.uint8]:
        key = IMAGES + camera
        value = message.get(key, message.get(IMAGE) if first else None)
        wanted = f"{key!r} must be uint8 (height, width, 3)"
        if not isinstance(value, np.ndarray):
            raise ObservationError(f"{wanted}; it is missing" if value is None else wanted)
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[-1] != 3:
            raise ObservationError(f"{wanted}, not {value.dtype} {value.shape}")
        if not all(1 <= side <= MAX_SIDE for side in value.shape[:2]):
            raise ObservationError(f"{wanted} with sides of 1 to {MAX_SIDE}, not {value.shape}")
        return value[None]

    def _state(self, message: Mapping[str, Any]) -> npt.NDArray[np.float32]:
        value = message.get(STATE, np.zeros(self.state_dim, np.float32) if not self.state_dim else None)
        if isinstance(value, list):
            value = np.asarray(value) if all(isinstance(item, int | float) for item in value) else None
        wanted = f"{STATE!r} must be {self.state_dim or 'up to ' + str(MAX_STATE)} finite numbers"
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or value.ndim != 1:
            raise ObservationError(wanted)
        if len(value) > MAX_STATE or (self.state_dim and len(value) != self.state_dim):
            raise ObservationError(f"{wanted}, not {len(value)}")
        with np.errstate(over="ignore"):
            state = value.astype(np.float32)
        if not np.isfinite(state).all():
            raise ObservationError(wanted)
        return state[None]


@dataclass
class Session:
    """One connection's copy of the policy: shared weights, its own episode. Called by one thread at a time.

    A policy keeps an episode's state by assigning attributes anew, so a shallow copy is a policy of its own.
    """

    policy: Policy
    action_horizon: int
    _own: Policy = field(init=False)
    _is_new: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self._own = copy.copy(self.policy)

    def act(self, observation: Observation, *, reset: bool) -> dict[str, Any]:
        """`actions` (T, A) and the milliseconds of the policy's parts."""
        if reset or self._is_new:
            self._own.reset(1)
            self._is_new = False
        started = time.perf_counter()
        actions = self._own.act(observation)[0, : self.action_horizon]
        if not np.isfinite(actions).all():
            raise ObservationError("the policy gave an action that is not finite; none is sent to a robot")
        parts = {name: 1e3 * seconds for name, seconds in getattr(self._own, "timings", {}).items()}
        total = {"infer_ms": 1e3 * (time.perf_counter() - started)}
        return {
            "actions": np.ascontiguousarray(actions),
            "policy_timing": total | {f"{k}_ms": v for k, v in parts.items()},
        }
