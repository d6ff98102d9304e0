"""The rollout suite on the simulator: the oracle solves what random actions do not; sequences for label propagation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from evaluation.label_propagation.sequences import SequencesConfig, simulate_davis
from evaluation.result import EvaluationResult
from evaluation.rollouts.arms import Expert, RandomActions
from evaluation.rollouts.config import RolloutsConfig, metaworld50
from evaluation.rollouts.environments import MakeMetaWorld, MetaWorldBatch
from evaluation.rollouts.fleet import Fleet
from evaluation.rollouts.loop import Batch, run_batch
from evaluation.rollouts.player import Rollout, Rules
from evaluation.rollouts.suite import run
from infra.errors import ConfigError, InputError
from infra.storage import read_json
from ingest.simulators.difficulty import SPLITS, tasks_of
from training.export import random_encoder, save_export
from training.models.common.vit import EncoderConfig
from training.models.policies import BehaviourCloningConfig, BehaviourCloningHead, BehaviourCloningPolicy

pytestmark = pytest.mark.sim


def export(folder: Path, *, sees: bool) -> str:
    encoder = None
    if sees:
        config = EncoderConfig(image_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2)
        encoder = random_encoder(config, seed=0)
    head = BehaviourCloningHead(
        BehaviourCloningConfig(
            feature="class_token" if sees else "none", feature_dim=32 if sees else 0, text_dim=0, hidden=(16,)
        )
    )
    policy = BehaviourCloningPolicy(head, encoder=encoder)
    save_export(
        folder,
        kind="bc-policy",
        model_config=policy.config,
        weights=policy.weights(),
        preprocessing=policy.preprocessing,
        card="untrained",
        inputs=[],
    )
    return str(folder)


def test_the_oracle_solves_what_random_actions_do_not():
    seeds = (10_000, 10_001, 10_002)

    def played(policy: object, max_steps: int) -> list[Rollout]:
        ended: list[Rollout] = []
        run_batch(fleet, policy, Batch("button-press-topdown", seeds, 3), rules=Rules(max_steps), on_ended=ended.append)
        return sorted(ended, key=lambda rollout: rollout.seed)

    with Fleet(MakeMetaWorld("corner4", 64, {}, trains_here=True), processes=1) as fleet:
        oracle = played(Expert(), 150)
        assert [rollout.ever for rollout in oracle] == [True] * 3
        assert all(20 < rollout.steps < 120 for rollout in oracle)
        assert [rollout.ever for rollout in played(RandomActions(action_dim=4), 60)] == [False] * 3
        assert played(Expert(), 150) == oracle


def test_pictures_in_a_batch_are_each_environments_own():
    batch = MetaWorldBatch("button-press-topdown", (1, 2), size=64)
    active = np.ones(2, bool)
    first = batch.observe(images=True, active=active)
    assert first.images["main"].shape == (2, 64, 64, 3)
    assert not np.array_equal(first.images["main"][0], first.images["main"][1])
    assert batch.observe(images=False, active=active).images == {}
    batch.step(np.ones((2, 4), np.float32), active=np.array([True, False]))
    second = batch.observe(images=True, active=np.array([True, False]))
    assert np.array_equal(second.images["main"][1], first.images["main"][1])
    assert not np.array_equal(second.images["main"][0], first.images["main"][0])
    batch.close()


def test_the_suite_writes_a_result_that_a_rerun_reads(tmp_path):
    config = RolloutsConfig(
        policy=export(tmp_path / "policy", sees=True),
        proprioception_policy=export(tmp_path / "blind", sees=False),
        arms=("random-actions", "proprioception", "other-episode", "oracle"),
        tasks=("handle-press",),
        num_seeds=2,
        max_steps=60,
        size=32,
        output=str(tmp_path / "result"),
        workers=1,
    )
    result = run(config)
    assert [item.item_id for item in result.items] == ["handle-press/10000", "handle-press/10001"]
    assert list(result.arms) == list(config.arms)
    assert all(
        [item.item_id for item in arm] == [item.item_id for item in result.items] for arm in result.arms.values()
    )
    assert result.arm_scores["oracle"]["success_ever"].successes == 2
    assert result.scores["success_last"].count == 2
    assert {"success_ever", "success_ever/handle-press"} <= result.scores.keys()
    assert result.model_digest in result.inputs
    clips = [path for path in result.artefacts.values() if path.endswith(".mp4")]
    assert len(clips) == 5
    for path in clips:
        with av.open(str(tmp_path / "result" / path)) as clip:
            assert sum(1 for _ in clip.decode(video=0)) == 31  # every second of 60 frames, and the last
    assert EvaluationResult.parse(read_json(tmp_path / "result" / "result.json")) == result
    latency = read_json(tmp_path / "result" / "latency.json")
    assert latency["single"]["control_hz"] > 0 and latency["arms"]["policy"]["decisions"] == 15
    assert sum(latency["arms"]["policy"]["histogram"]["counts"]) == 15
    stamp = (tmp_path / "result" / "result.json").stat().st_mtime_ns
    assert run(config) == result
    assert (tmp_path / "result" / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="different: max_steps"):
        run(config.model_copy(update={"max_steps": 50}))


def small(folder: Path, name: str, **changes: object) -> RolloutsConfig:
    wanted = {
        "policy": str(folder / "policy"), "proprioception_policy": str(folder / "blind"),
        "arms": ("random-actions", "proprioception", "other-episode"), "tasks": ("handle-press",),
        "num_seeds": 5, "batch_size": 3, "max_steps": 12, "size": 32, "output": str(folder / name), "workers": 1,
    }  # fmt: skip
    return RolloutsConfig(**(wanted | changes))


def test_killed_anywhere_and_for_any_number_of_processes_the_result_is_the_same_to_the_last_byte(tmp_path):
    export(tmp_path / "policy", sees=True)
    export(tmp_path / "blind", sees=False)
    run(small(tmp_path, "undisturbed"))
    expected = (tmp_path / "undisturbed" / "result.json").read_bytes()
    config = small(tmp_path, "killed", workers=3)
    config.save(tmp_path / "config.json")
    for episodes in (1, 13):  # in the middle of a batch of the policy, and of an arm
        done = subprocess.run(
            [sys.executable, "-m", "evaluation.main", str(tmp_path / "config.json")],
            env={**os.environ, "FOREFRAME_FAULT": f"rollouts.after_episode:{episodes}", "OMP_NUM_THREADS": "1"},
            capture_output=True, check=False, timeout=200,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    recorded = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "episodes" / "policy").rglob("*.json")}
    assert recorded and not (tmp_path / "killed" / "result.json").exists()
    one = next(iter(recorded))
    kept = one.read_bytes()
    one.write_bytes(kept.replace(b'"suite_version": "2-', b'"suite_version": "1-'))  # of another simulator, say
    os.utime(one, ns=(recorded[one], recorded[one]))
    with pytest.raises(InputError, match="of suite version 1-"):
        run(config)
    one.write_bytes(kept)
    os.utime(one, ns=(recorded[one], recorded[one]))
    run(config)
    assert (tmp_path / "killed" / "result.json").read_bytes() == expected
    assert {path: path.stat().st_mtime_ns for path in recorded} == recorded  # none was played twice


def test_fifty_tasks_in_the_published_split():
    config = metaworld50("p", output="o")
    assert (len(config.tasks), config.num_seeds, config.max_steps) == (50, 25, 500)
    sizes = {split: len(tasks_of(split)) for split in SPLITS}
    assert sizes == {"easy": 28, "middle": 11, "hard": 11, "hard-only": 6, "very-hard": 5}
    assert set(config.tasks) == tasks_of("easy") | tasks_of("middle") | tasks_of("hard")


def test_an_arm_without_what_it_needs_is_refused():
    with pytest.raises(ConfigError, match="'mean-demonstration' needs episodes"):
        RolloutsConfig.parse({"policy": "p", "proprioception_policy": "q", "tasks": ["reach"], "output": "o"})


def grouped(num_seeds: int, batch_size: int, **changes: object) -> RolloutsConfig:
    values = {"policy": "p", "tasks": ["reach"], "output": "o", "arms": ["other-episode"], "first_seed": 0}
    return RolloutsConfig.parse({**values, "num_seeds": num_seeds, "batch_size": batch_size, **changes})


def test_no_episode_is_left_alone_in_its_batch():
    config = grouped(21, 20)
    assert [len(seeds) for seeds in config.groups] == [10, 11] and config.num_rows == 11
    assert sum(config.groups, ()) == config.seeds
    for num_seeds in range(1, 60):
        for batch_size in range(1, 30):
            sizes = [len(seeds) for seeds in grouped(num_seeds, batch_size, arms=[]).groups]
            assert sum(sizes) == num_seeds and max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    with pytest.raises(ConfigError, match="batches of at least 2"):
        grouped(3, 2)  # one of the three would be shown its own pictures


def test_other_policies_have_names_that_are_folders():
    with pytest.raises(ConfigError, match="name folders of clips"):
        grouped(4, 4, other_policies={"../mine": "q"})


def test_simulated_sequences_hold_both_objects_and_are_made_once(tmp_path):
    config = SequencesConfig(tasks=("handle-press", "drawer-close"), size=96, max_frames=6, min_pixels=16)
    davis = simulate_davis(tmp_path, config)
    assert davis.names == ("handle-press-20000", "drawer-close-20000")
    for name in davis.names:
        frames, labels = davis.frames(name), davis.labels(name)
        assert frames.shape == (6, 96, 96, 3)
        assert set(np.unique(labels)) == {0, 1, 2}
        red = frames[..., 0].astype(int) - frames[..., 1:].max(axis=-1) > 40
        assert red[labels == 1].mean() > 0.5  # the arm is painted red
        assert (labels[0] != labels[-1]).any()
    stamp = (tmp_path / "JPEGImages/480p/drawer-close-20000/00000.jpg").stat().st_mtime_ns
    assert simulate_davis(tmp_path, config).names == davis.names
    assert (tmp_path / "JPEGImages/480p/drawer-close-20000/00000.jpg").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="other simulated sequences"):
        simulate_davis(tmp_path, config.model_copy(update={"stride": 2}))
