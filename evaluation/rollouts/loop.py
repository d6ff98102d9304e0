"""The rollout loop: the episodes of a batch ask the policy together, once for each executed action chunk.

A batch always has the same number of rows. An episode that ended, or was recorded by an earlier run, keeps its row and
shows what it showed last, so the arithmetic of a row never depends on which others still run.

Shape letters: R rows, N episodes played, T executed steps of a chunk, A action, P proprioception.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluation.rollouts.arms import Expert
from evaluation.rollouts.environments import Actions
from evaluation.rollouts.fleet import Fleet
from evaluation.rollouts.latency import ArmTimings
from evaluation.rollouts.player import News, Rollout, Rules, Scene
from infra.errors import DataError
from ingest.schema import DEFAULT_CAMERA
from training.protocols import Images, Observation, Policy


@dataclass(frozen=True)
class Batch:
    """Episodes that ask a policy together: row i is that of `seeds[i]`, and rows beyond them are spare."""

    task: str
    seeds: tuple[int, ...]
    num_rows: int
    recorded: frozenset[int] = frozenset()  # seeds that an earlier run has played
    filmed: frozenset[int] = frozenset()

    @property
    def missing(self) -> tuple[int, ...]:
        """The seeds to play."""
        return tuple(seed for seed in self.seeds if seed not in self.recorded)

    @property
    def keys(self) -> tuple[str, ...]:
        """What a policy's random draws follow from, a name for every row."""
        spare = range(len(self.seeds), self.num_rows)
        return (*(f"{self.task}/{seed}" for seed in self.seeds), *(f"spare/{row}" for row in spare))


def cameras_of(policy: Policy) -> tuple[str, ...]:
    """The cameras a policy looks through: its `cameras` or `camera`, else "main"; none for one without eyes."""
    if not policy.needs_images:
        return ()
    return tuple(getattr(policy, "cameras", ())) or (str(getattr(policy, "camera", DEFAULT_CAMERA)),)


def run_batch(
    fleet: Fleet,
    policy: Policy | Expert,
    batch: Batch,
    *,
    rules: Rules,
    on_ended: Callable[[Rollout], None],
    timings: ArmTimings | None = None,
) -> None:
    """Play the missing seeds of a batch; `on_ended` is told of each episode as it ends.

    Raises `DataError` on a chunk of a wrong shape or with a value that is not finite, and what a simulator raised.
    """
    timings = timings if timings is not None else ArmTimings()
    began = time.perf_counter()
    rows = _Rows(batch)

    def listen(news: News) -> None:
        rows.take(news)
        timings.add_costs(news.costs)
        for rollout in news.ended:
            on_ended(rollout)

    cameras = () if isinstance(policy, Expert) else cameras_of(policy)
    places = tuple(range(len(batch.missing)))
    for news in fleet.start(Scene(batch.task, batch.missing, places, batch.filmed, cameras), rules):
        listen(news)
    if not isinstance(policy, Expert):
        policy.reset(batch.num_rows)
    taken = 0
    while rows.going_on:
        chunk_NTA, num_steps = None, rules.max_steps
        if not isinstance(policy, Expert):
            chunk_RTA = _decide(policy, rows, timings)
            num_steps = min(chunk_RTA.shape[1], rules.max_steps - taken)
            chunk_NTA = chunk_RTA[rows.of_places, :num_steps]
            timings.num_control_steps += num_steps
        rows.going_on.clear()
        for news in fleet.advance(chunk_NTA, num_steps=num_steps):
            listen(news)
        taken += num_steps
    timings.wall_s += time.perf_counter() - began


class _Rows:
    """What every row of a batch shows now."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.of_places = [row for row, seed in enumerate(batch.seeds) if seed not in batch.recorded]
        self.going_on: set[int] = set()
        self.action_dim = 0
        # Spare rows repeat the first ones: whoever looks at the row behind the last episode finds the first.
        self._order = [row % len(batch.seeds) for row in range(batch.num_rows)]
        self._images: dict[str, Images] = {}
        self._proprioception: npt.NDArray[np.float32] | None = None
        self._texts: dict[int, str] = {}

    def take(self, news: News) -> None:
        """Rows whose episodes go on get what these show; the others keep theirs."""
        self.action_dim = news.action_dim
        rows = [self.of_places[place] for place in news.places]
        self.going_on.update(rows)
        if news.observation is None:
            return
        seen, count = news.observation, len(self.batch.seeds)
        for camera, images in seen.images.items():
            if camera not in self._images:
                self._images[camera] = np.zeros((count, *images.shape[1:]), np.uint8)
            self._images[camera][rows] = images
        if self._proprioception is None:
            self._proprioception = np.zeros((count, seen.proprioception.shape[1]), np.float32)
        self._proprioception[rows] = seen.proprioception
        self._texts.update(zip(rows, seen.text, strict=True))

    def observation(self) -> Observation:
        """All rows, copies."""
        assert self._proprioception is not None, "no episode has begun"
        some_text = self._texts[min(self._texts)]
        return Observation(
            {camera: images[self._order] for camera, images in self._images.items()},
            self._proprioception[self._order],
            tuple(self._texts.get(row, some_text) for row in self._order),
            self.batch.keys,
        )


def _decide(policy: Policy, rows: _Rows, timings: ArmTimings) -> Actions:
    observation = rows.observation()
    began = time.perf_counter()
    chunk_RTA = np.asarray(policy.act(observation), np.float32)
    timings.add_decision(time.perf_counter() - began, policy, batch_size=rows.batch.num_rows)
    task, expected = rows.batch.task, (rows.batch.num_rows, rows.action_dim)
    if chunk_RTA.ndim != 3 or (chunk_RTA.shape[0], chunk_RTA.shape[2]) != expected or chunk_RTA.shape[1] < 1:
        raise DataError(
            f"the policy gave actions of shape {chunk_RTA.shape} on {task!r}, "
            f"not ({expected[0]}, steps, {expected[1]}).",
            remedy="Is it a policy of this simulator?",
        )
    if not np.isfinite(chunk_RTA).all():
        raise DataError(f"the policy gave an action that is not finite on {task!r}.")
    return chunk_RTA


def clip_fps(control_hz: int, clip_stride: int, *, speed: float = 0.5) -> float:
    """Frame rate of a clip shown at `speed` times real time."""
    return control_hz * speed / clip_stride
