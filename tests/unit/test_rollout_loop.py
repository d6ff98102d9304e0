"""What a rollout counts, held by an environment whose successes are written down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluation.rollouts.arms import OtherEpisode, RandomActions, ReplayedActions, mean_demonstrations
from evaluation.rollouts.fleet import Fleet
from evaluation.rollouts.loop import Batch, run_batch
from evaluation.rollouts.player import Rollout, Rules
from evaluation.rollouts.records import item_of
from evaluation.rollouts.scores import differences, scores_of
from infra.errors import ConfigError, DataError
from ingest.reader import ShardDataset
from tests.helpers_data import make_episode_dataset
from training.protocols import Observation


class Script:
    """B environments that are solved at the steps given, counted from 1."""

    task, action_dim = "script", 2

    def __init__(self, *solved: set[int]) -> None:
        self.solved, self.seeds = solved, tuple(range(100, 100 + len(solved)))
        self.taken = np.zeros(len(solved), int)
        self.rendered = 0

    def reset(self) -> None:
        self.taken[:] = 0
        self.actions: list[np.ndarray] = []

    def observe(self, *, images, active, cameras=None) -> Observation:
        pictures = np.arange(len(self.seeds), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
        self.rendered += images * int(active.sum())
        state = np.zeros((len(self.seeds), 4), np.float32)
        return Observation({"main": pictures} if images else {}, state, ("go",) * len(self.seeds))

    def step(self, actions, *, active) -> np.ndarray:
        self.actions.append(actions)
        self.taken += active
        return np.array([a and t in s for a, t, s in zip(active, self.taken, self.solved, strict=True)])

    def picture(self, index: int, *, camera: str = "main") -> np.ndarray:
        return np.full((2, 2, 3), self.taken[index], np.uint8)

    def expert_actions(self) -> np.ndarray:
        return np.zeros((len(self.seeds), 2), np.float32)

    def close(self) -> None: ...


class Watcher:
    """Counts its calls and remembers what it saw."""

    def __init__(self, *, needs_images: bool = True, action_horizon: int = 4) -> None:
        self.needs_images, self.action_horizon, self.digest = needs_images, action_horizon, "0" * 64
        self.seen: list[Observation] = []

    def reset(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def act(self, observation: Observation) -> np.ndarray:
        self.seen.append(observation)
        return np.full((self.batch_size, self.action_horizon, 2), 0.5, np.float32)


def play(
    environment: Script, policy: object, *, max_steps: int, num_rows: int = 0, recorded: set[int] | None = None,
    filmed: set[int] | None = None, **rules: object,
) -> list[Rollout]:  # fmt: skip
    """The episodes of a batch, in the order of their seeds."""
    seeds = environment.seeds
    batch = Batch("script", seeds, num_rows or len(seeds), frozenset(recorded or ()), frozenset(filmed or ()))
    ended: list[Rollout] = []
    with Fleet(lambda task, seeds: environment, processes=1) as fleet:
        run_batch(fleet, policy, batch, rules=Rules(max_steps, **rules), on_ended=ended.append)
    return sorted(ended, key=lambda rollout: rollout.seed)


def metrics(environment: Script, **options) -> list[dict[str, float]]:
    played = play(environment, Watcher(needs_images=False), max_steps=10, **options)
    return [item_of(rollout, "script").metrics for rollout in played]


def test_success_ever_and_at_the_last_step_are_two_things():
    flickering, lasting, never = {3}, {3, *range(5, 11)}, set()
    assert metrics(Script(flickering, lasting, never)) == [
        {"success_ever": 1.0, "success_last": 0.0, "steps": 3.0},
        {"success_ever": 1.0, "success_last": 1.0, "steps": 3.0},
        {"success_ever": 0.0, "success_last": 0.0, "steps": 10.0},
    ]


def test_stopping_at_success_says_nothing_about_the_last_step():
    environment = Script({3}, {3, 10}, set())
    assert metrics(environment, stop_on_success=True) == [
        {"success_ever": 1.0, "steps": 3.0},
        {"success_ever": 1.0, "steps": 3.0},
        {"success_ever": 0.0, "steps": 10.0},
    ]
    assert environment.taken.tolist() == [3, 3, 10]


def test_a_policy_acts_once_per_chunk_and_a_blind_one_costs_no_picture():
    environment, watcher = Script(set(), set()), Watcher()
    play(environment, watcher, max_steps=10)
    assert len(watcher.seen) == 3  # 4 + 4 + 2 steps
    assert len(environment.actions) == 10
    assert environment.rendered == 6
    blind = Watcher(needs_images=False)
    play(environment, blind, max_steps=10)
    assert environment.rendered == 6
    assert blind.seen[0].images == {}


def test_clips_hold_every_second_frame_and_the_last():
    filmed, unfilmed = play(Script({3}, set()), Watcher(), max_steps=5, filmed={100})
    assert [int(frame[0, 0, 0]) for frame in filmed.frames] == [0, 2, 4, 5]
    assert unfilmed.frames == ()


def test_actions_of_a_wrong_shape_or_not_finite_are_refused():
    watcher = Watcher()
    watcher.act = lambda observation: np.zeros((2, 4, 7), np.float32)
    with pytest.raises(DataError, match=r"\(2, 4, 7\)"):
        play(Script(set(), set()), watcher, max_steps=4)
    watcher.act = lambda observation: np.full((2, 4, 2), np.nan, np.float32)
    with pytest.raises(DataError, match="not finite"):
        play(Script(set(), set()), watcher, max_steps=4)


def test_the_other_episodes_pictures_are_those_of_no_environment_itself():
    watcher = Watcher()
    play(Script(set(), set(), set()), OtherEpisode(watcher), max_steps=4)
    assert watcher.seen[0].images["main"][:, 0, 0, 0].tolist() == [1, 2, 0]
    play(Script(set(), set(), set()), OtherEpisode(watcher), max_steps=4, num_rows=5)
    assert watcher.seen[-1].images["main"][:3, 0, 0, 0].tolist() == [1, 2, 0]  # spare rows change nothing
    with pytest.raises(ConfigError, match="at least 2"):
        play(Script(set()), OtherEpisode(watcher), max_steps=4)


def test_random_actions_belong_to_the_episode_not_to_the_batch():
    def blank(*keys: str) -> Observation:
        return Observation({}, np.zeros((len(keys), 4), np.float32), ("",) * len(keys), keys)

    both, one = RandomActions(action_dim=4), RandomActions(action_dim=4)
    first = both.act(blank("a/5", "a/6"))
    assert np.array_equal(first[1:], one.act(blank("a/6")))
    assert not np.array_equal(first[0], first[1])
    assert np.abs(first).max() <= 1
    assert not np.array_equal(both.act(blank("a/5", "a/6")), first)
    both.reset(2)
    assert np.array_equal(both.act(blank("a/5", "a/6")), first)


def test_a_batch_keeps_its_rows_whoever_still_plays():
    watcher = Watcher()
    played = play(Script({1}, {9}, set()), watcher, max_steps=10, num_rows=5, stop_on_success=True)
    assert [len(seen.text) for seen in watcher.seen] == [5, 5, 5]
    assert watcher.seen[0].keys == ("script/100", "script/101", "script/102", "spare/3", "spare/4")
    assert [rollout.steps for rollout in played] == [1, 9, 10]


def test_recorded_episodes_are_not_played_again_and_change_nothing_for_the_others():
    whole = play(Script({3}, {5}, set()), Watcher(needs_images=False), max_steps=6)

    class Rest(Script):
        """The two that are left, under the seeds of the three."""

        def __init__(self) -> None:
            super().__init__({5}, set())
            self.played, self.seeds = (101, 102), (100, 101, 102)

    environment = Rest()
    seen_seeds: list[tuple[int, ...]] = []

    def make(task: str, seeds: tuple[int, ...]) -> Script:
        seen_seeds.append(seeds)
        environment.seeds = seeds
        return environment

    batch = Batch("script", (100, 101, 102), 3, frozenset({100}))
    ended: list[Rollout] = []
    watcher = Watcher(needs_images=False)
    with Fleet(make, processes=1) as fleet:
        run_batch(fleet, watcher, batch, rules=Rules(6), on_ended=ended.append)
    assert seen_seeds == [(101, 102)]
    assert sorted(ended, key=lambda rollout: rollout.seed) == whole[1:]
    assert len(watcher.seen[0].text) == 3


def test_the_mean_demonstration_is_the_mean_and_holds_its_end(tmp_path: Path):
    url = make_episode_dataset(tmp_path / "data", num_episodes=3, num_frames=6, last_frame_has_action=True)
    dataset = ShardDataset(url)
    mean = mean_demonstrations(dataset, ("move-square",))["move-square"]
    expected = np.mean([dataset.arrays(index)["actions"] for index in range(3)], axis=0)
    assert np.allclose(mean, expected, atol=1e-6)
    replay = ReplayedActions(mean)
    replay.reset(2)
    blank = Observation({}, np.zeros((2, 4), np.float32), ("", ""))
    chunks = [replay.act(blank) for _ in range(8)]
    assert chunks[0].shape == (2, 1, 4)
    assert np.array_equal(chunks[2][1, 0], mean[2])
    assert np.array_equal(chunks[7][0, 0], mean[-1])
    with pytest.raises(DataError, match="window-open"):
        mean_demonstrations(dataset, ("window-open",))


def played_items(**solved: set[int]):
    return [
        item_of(rollout, task)
        for task, steps in solved.items()
        for rollout in play(Script(steps, steps), Watcher(), max_steps=2)
    ]


def test_scores_are_pooled_and_per_task():
    scores = scores_of(played_items(a={1}, b=set()))
    pooled = scores["success_ever"]
    assert (pooled.successes, pooled.count, pooled.method) == (2, 4, "wilson")
    assert pooled.low == pytest.approx(0.1500, abs=1e-4)  # Wilson's interval of 2 in 4, worked out by hand
    assert pooled.high == pytest.approx(0.8500, abs=1e-4)
    assert (scores["success_ever/a"].value, scores["success_ever/b"].value) == (1.0, 0.0)
    assert scores["iqm/success_ever"].value == 0.5  # 0, 0, 1, 1 without the ends: 0, 1
    assert not any(name.startswith("split/") for name in scores)


def test_splits_appear_where_tasks_differ_in_difficulty():
    items = [
        item.model_copy(update={"stratum": task, "item_id": f"{task}/{number}"})
        for task in ("reach", "hammer", "push", "stick-pull")
        for number, item in enumerate(played_items(a={1} if task == "reach" else set()))
    ]
    scores = scores_of(items)
    assert (scores["split/easy"].value, scores["split/middle"].value, scores["split/hard"].count) == (1.0, 0.0, 4)


def test_differences_are_paired_by_seed_and_left_out_where_they_say_nothing():
    many = [item.model_copy(update={"item_id": f"a/{number}"}) for number, item in enumerate(played_items(a={1}) * 5)]
    none = [item.model_copy(update={"metrics": {**item.metrics, "success_ever": 0.0}}) for item in many]
    found = differences(many, {"random-actions": none})["difference/random-actions"]
    assert (found.value, found.count) == (1.0, 10) and found.low > 0
    assert differences(many[:3], {"random-actions": none[:3]}) == {}
