"""The suite's idea of CALVIN against a real checkout: FOREFRAME_CALVIN=/path/to/calvin, with its packages installed.

Both worlds are held to the same statements, the small table always and the checkout when there is one.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from evaluation.calvin.chains import read_chains, start_of
from evaluation.calvin.environment import Checkout, Seen
from evaluation.calvin.suite import evaluate
from tests.helpers_calvin import Scripted, TableBenchmark, small_config


@pytest.fixture(params=["table", "calvin_checkout"])
def benchmark_of_calvin(request):
    if request.param == "table":
        return TableBenchmark()
    root = os.environ.get("FOREFRAME_CALVIN")
    if not root:
        pytest.skip("FOREFRAME_CALVIN names no checkout")
    checkout = Checkout(Path(root).resolve())
    checkout.check()
    return checkout


def test_sentences_and_facts_cover_all_tasks(benchmark_of_calvin):
    sentences = benchmark_of_calvin.sentences()
    assert set(read_chains().tasks) <= sentences.keys()
    assert all(sentence.strip() for sentence in sentences.values())
    assert benchmark_of_calvin.facts() == benchmark_of_calvin.facts()


def test_a_chain_is_played_in_a_process_of_its_own(benchmark_of_calvin, tmp_path):
    """The environment lives in the child alone, so this process never imports CALVIN."""
    config = small_config(tmp_path, sequences=2, max_steps=12, processes=2, num_clips=1)
    policy = Scripted({})
    result = evaluate(config, policy, benchmark_of_calvin)
    assert [item.details["steps"] for item in result.items] == [[12], [12]]
    robot, _ = start_of(read_chains().chains[0].state)
    # The arm stands where the published start has it; the hand's pose follows from its joints.
    assert np.allclose(policy.seen[0].proprioception[0, 7:14], robot[7:14], atol=1e-2)
    first, last = policy.seen[0], policy.seen[-1]
    assert first.images["static"].shape[1:] == (200, 200, 3) and first.images["gripper"].shape[1:] == (84, 84, 3)
    assert len(policy.seen) == 2 and last.keys == first.keys


def test_the_oracle_is_content_with_nothing_when_nothing_changed(benchmark_of_calvin):
    world = benchmark_of_calvin.build()
    robot, scene = start_of(read_chains().chains[0].state)
    world.environment.reset(robot_obs=robot, scene_obs=scene)
    Seen.of(world.environment.get_obs())
    start = world.environment.get_info()
    hold = np.array([0, 0, 0, 0, 0, 0, 1.0])
    _, _, _, info = world.environment.step(hold)
    assert world.oracle.get_task_info_for_set(start, info, set(read_chains().tasks)) == set()
    world.environment.close()
