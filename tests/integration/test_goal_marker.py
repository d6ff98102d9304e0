"""Without the marker reach, push and pick-place start alike and go on differently: only the sentence tells which."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from ingest.simulators.config import SimulateConfig
from ingest.simulators.generate import Episode, demonstrate, run
from ingest.simulators.metaworld import MetaWorldEnv, Renderer

pytestmark = pytest.mark.sim

TASKS = ("reach", "push", "pick-place")
SEEDS = (0, 1, 2)


def episodes(marker: str, *, seeds: tuple[int, ...] = SEEDS, steps: int = 41) -> dict[tuple[str, int], Episode]:
    """Half a second of the oracle in each task, at equal seeds."""
    config = SimulateConfig(output="unused", tasks=TASKS, goal_marker=marker, noise=0.0, max_steps=steps)
    made = {}
    for task in TASKS:
        env = MetaWorldEnv(task, 0)
        with Renderer(task, camera=config.camera, size=config.size, flags=config.render_flags(task)) as renderer:
            for seed in seeds:
                env.reset(seed)
                made[task, seed] = demonstrate(env, renderer, config, noise_rng=np.random.default_rng(0))
    return made


@pytest.fixture(scope="module")
def hidden() -> dict[tuple[str, int], Episode]:
    return episodes("hidden")


def changed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(H, W) largest difference over the colours."""
    return np.abs(one.astype(int) - other.astype(int)).max(axis=-1)


@pytest.mark.parametrize("seed", SEEDS)
def test_first_frames_agree_without_the_marker(hidden, seed: int):
    """reach and pick-place to the last bit; push puts its puck 0.6 mm lower: a few pixels, two levels at most."""
    first = {task: hidden[task, seed].frames[0] for task in TASKS}
    assert np.array_equal(first["reach"], first["pick-place"])
    difference = changed(first["push"], first["reach"])
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.0005
    for task in TASKS:
        assert np.array_equal(
            hidden[task, seed].arrays["proprioception"][0], hidden["reach", seed].arrays["proprioception"][0]
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_then_the_three_move_apart(hidden, seed: int):
    for one, other in itertools.combinations(TASKS, 2):
        apart = hidden[one, seed].arrays["proprioception"][-1] - hidden[other, seed].arrays["proprioception"][-1]
        assert np.linalg.norm(apart[:3]) > 0.03
        assert (changed(hidden[one, seed].frames[-1], hidden[other, seed].frames[-1]) > 8).mean() > 0.05


def test_the_marker_alone_tells_the_tasks_apart():
    shown = episodes("auto", seeds=(0,), steps=1)
    for one, other in itertools.combinations(TASKS, 2):
        difference = changed(shown[one, 0].frames[0], shown[other, 0].frames[0])
        assert difference.max() > 100
        assert 5 <= (difference > 8).sum() <= 40  # the dot, nothing else


def test_the_record_says_which_and_one_process_can_make_both(tmp_path):
    pictures = {}
    for marker in ("auto", "hidden"):
        folder = tmp_path / marker
        run(SimulateConfig(output=str(folder), tasks=("reach",), episodes=1, goal_marker=marker, size=32, workers=1))
        record = json.loads((folder / "reach" / "seed-00000.json").read_text())
        assert record["render"]["goal_marker"] == (marker == "auto")
        pictures[marker] = record["sha256"]
    assert pictures["auto"]["npz"] == pictures["hidden"]["npz"]
    assert pictures["auto"]["mp4"] != pictures["hidden"]["mp4"]
