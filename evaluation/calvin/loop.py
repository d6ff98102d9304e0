"""Chains played side by side: rounds of one subtask each, one call of the policy for all of them.

A round is a subtask: everybody begins one, the policy is reset once, and the round ends when everybody has solved it
or run out of steps. A chain that ended leaves its place to the next one. The policy always sees `batch_size` rows.

Shape letters: B rows, T executed steps of a chunk, A action.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evaluation.calvin.actors import Actions, Actor
from evaluation.calvin.chains import Chain
from evaluation.calvin.config import ACTION_DIM, CAMERAS, CHAIN_LENGTH
from evaluation.calvin.environment import Picture, Seen
from evaluation.rollouts.latency import ArmTimings
from infra.errors import DataError
from training.protocols import Observation, Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Played:
    """How far a chain came: steps of every subtask that was tried, the last of them unsolved unless all are."""

    chain: Chain
    num_solved: int
    num_steps: tuple[int, ...]
    frames: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What a round needs to know. `sentences` maps a task to its instruction."""

    sentences: Mapping[str, str]
    max_steps: int
    batch_size: int
    seed: int = 0


@dataclass
class _Place:
    """A chain being played."""

    chain: Chain
    actor: Actor
    num_solved: int = 0
    num_steps: list[int] = field(default_factory=list)
    frames: list[Picture] = field(default_factory=list)
    seen: Seen | None = None
    active: bool = True  # still at the subtask of this round

    @property
    def task(self) -> str:
        return self.chain.tasks[self.num_solved]

    @property
    def ended(self) -> bool:
        """Failed at a subtask, or solved them all."""
        return len(self.num_steps) > self.num_solved or self.num_solved == CHAIN_LENGTH

    def played(self) -> Played:
        return Played(self.chain, self.num_solved, tuple(self.num_steps), tuple(self.frames))


class ChainLoop:
    """Plays chains with one policy; `timings` are those of its decisions, `shown` is what it saw last."""

    def __init__(self, policy: Policy, rules: Rules) -> None:
        self._policy, self._rules = policy, rules
        self.timings = ArmTimings()
        self.shown: Observation | None = None

    def run(
        self,
        chains: Sequence[Chain],
        *,
        open_actor: Callable[[Chain], Actor],
        num_places: int,
        on_played: Callable[[Played], None],
    ) -> None:
        """Play all chains, `num_places` at once; `on_played` is told of each as it ends.

        Raises `DataError` on actions of a wrong shape or not finite, and what an environment raised.
        """
        pending, places = deque(chains), list[_Place]()
        try:
            while pending or places:
                while pending and len(places) < num_places:
                    chain = pending.popleft()
                    places.append(_Place(chain, open_actor(chain)))
                self._round(places)
                for place in [place for place in places if place.ended]:
                    place.actor.close()
                    places.remove(place)
                    on_played(place.played())
        finally:
            for place in places:
                place.actor.close()

    def _round(self, places: list[_Place]) -> None:
        for place in places:
            place.actor.ask_start(place.task)
        for place in places:
            place.seen, place.active = place.actor.started(), True
            place.num_steps.append(0)
        keys = [self._key(place) for place in places]
        texts = [self._rules.sentences[place.task] for place in places]
        self._policy.reset(self._rules.batch_size)
        taken = 0
        while taken < self._rules.max_steps and any(place.active for place in places):
            self.shown = self._observe(places, texts, keys)
            num_steps = self._advance(places, self._decide(self.shown)[:, : self._rules.max_steps - taken])
            self.timings.num_control_steps += num_steps
            taken += num_steps

    def _advance(self, places: list[_Place], chunk_BTA: Actions) -> int:
        """Execute a chunk in every active place -> its length."""
        active = [(row, place) for row, place in enumerate(places) if place.active]
        for row, place in active:
            place.actor.ask_advance(chunk_BTA[row])
        for _, place in active:
            moved = place.actor.moved()
            place.seen = moved.seen
            place.num_steps[-1] += moved.num_steps
            place.frames.extend(moved.frames)
            if moved.solved:
                place.num_solved, place.active = place.num_solved + 1, False
        return chunk_BTA.shape[1]

    def _observe(self, places: list[_Place], texts: list[str], keys: list[str]) -> Observation:
        """All rows; places that wait show what they showed last, rows without a place repeat the last one."""
        batch = self._rules.batch_size
        rows = [min(row, len(places) - 1) for row in range(batch)]
        seen = [place.seen for place in places if place.seen is not None]
        images = {}
        if self._policy.needs_images:
            images = {camera: np.stack([seen[row].images[camera] for row in rows]) for camera in CAMERAS}
        return Observation(
            images,
            np.stack([seen[row].proprioception for row in rows]),
            tuple(texts[row] for row in rows),
            (*keys, *(f"spare/{row}" for row in range(len(places), batch))),
        )

    def _decide(self, observation: Observation) -> Actions:
        began = time.perf_counter()
        chunk_BTA = np.array(self._policy.act(observation), np.float32)
        took = time.perf_counter() - began
        self.timings.add_decision(took, self._policy, batch_size=self._rules.batch_size)
        expected = (self._rules.batch_size, ACTION_DIM)
        if chunk_BTA.ndim != 3 or (chunk_BTA.shape[0], chunk_BTA.shape[2]) != expected or chunk_BTA.shape[1] < 1:
            raise DataError(
                f"the policy gave actions of shape {chunk_BTA.shape}, not ({expected[0]}, steps, {ACTION_DIM}).",
                remedy="Is it a policy of CALVIN's relative actions?",
            )
        if not np.isfinite(chunk_BTA).all():
            raise DataError(f"the policy gave an action that is not finite at {observation.keys[0]}.")
        chunk_BTA[..., -1] = np.where(chunk_BTA[..., -1] > 0, 1.0, -1.0)
        return chunk_BTA

    def _key(self, place: _Place) -> str:
        """What the policy's draws follow from: chain and task, and a seed other than 0."""
        seed = f"/seed-{self._rules.seed}" if self._rules.seed else ""
        return f"{place.chain.item_id}/{place.task}{seed}"
