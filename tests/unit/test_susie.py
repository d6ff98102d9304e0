"""Susie style: goals of training, sub-goals in use, and the diffusion policy that goes there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, InputError
from ingest.reader import ShardDataset
from tests.helpers_baselines import SMALL_CHUNK, fit, make_ruled_dataset, make_video_model, smaller, square_at
from training.export import load_policy
from training.export_baselines import load_susie
from training.export_files import read_record
from training.export_video import load_video_model
from training.launch import launch
from training.loop import Group
from training.main import parse_config
from training.models.common.resnet import ResNetConfig
from training.models.common.unet1d import UNet1DConfig
from training.models.subgoal import SubgoalConfig, SubgoalNetwork
from training.plan import dry_run
from training.protocols import Observation, Policy
from training.recipes import susie

SIZE = 32


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video_model(tmp_path_factory.mktemp("video"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_ruled_dataset(tmp_path_factory.mktemp("ruled"), num_episodes=3, num_frames=9)


@pytest.fixture(scope="module")
def trained(video, data, tmp_path_factory):
    config = small(video, data, tmp_path_factory.mktemp("trained"), "goals=reconstructed")
    return config, launch(config)


def small(video, data, output, *assignments):
    config = susie.tiny(video=video, data=data, output=str(output), stride=2)
    sizes = ("plan.num_steps=2", "subgoal_every=4", "goals=real")
    return smaller(config, *SMALL_CHUNK, *sizes, *assignments)


def visited(task, *, passes=1):
    count = task.num_clips
    loaded = task.batches(
        steps=range(passes), global_batch_size=count, micro_batch_size=count, group=Group(), loader_workers=0
    )
    return [batch for [batch] in loaded]


def observation(keys, seed=0, text="follow"):
    pictures = np.random.default_rng(seed).integers(0, 256, (len(keys), 40, 40, 3), dtype=np.uint8)
    return Observation({"main": pictures}, np.zeros((len(keys), 4), np.float32), (text,) * len(keys), tuple(keys))


def test_it_learns_to_go_where_the_goal_is():
    torch.manual_seed(0)
    config = SubgoalConfig(
        image_size=SIZE, chunk=4, execute=2, action_dim=2, proprioception_dim=0,
        vision=ResNetConfig(width=8, blocks=(1,), group_channels=4, keypoints=8, feature_dim=32),
        unet=UNet1DConfig(channels=(32, 32), step_dim=16),
    )  # fmt: skip
    network = SubgoalNetwork(config)

    def pairs(count, seed):
        random = np.random.default_rng(seed)
        start, way = random.uniform(10, 22, (count, 2)), random.choice([-0.8, 0.8], (count, 2))
        shown = [
            [square_at(*place, SIZE), square_at(*(place + 5 * step), SIZE)]
            for place, step in zip(start, way, strict=True)
        ]
        return torch.from_numpy(np.array(shown)), torch.from_numpy(way).float()[:, None].expand(-1, 4, -1)

    def loss_of(step):
        pictures, way = pairs(32, step)
        draws = {"steps_B": torch.randint(100, (32,)), "noise_BKD": torch.randn(32, 4, 2)}
        return network.loss(pictures, torch.zeros(32, 0), targets_BKD=way, **draws)

    losses = fit(network, loss_of, steps=200)
    assert np.mean(losses[-20:]) < 0.3 * losses[0]
    pictures, way = pairs(64, 10_000)
    with torch.no_grad():
        condition = network.condition(pictures, torch.zeros(64, 0))
    sampled = network.head.sample(condition, torch.randn(64, 1, 4, 2))
    assert ((sampled * way) > 0).float().mean() > 0.85


def test_goals_lie_ahead_in_the_same_episode_and_end_with_it(video, data, tmp_path):
    task = small(video, data, tmp_path, "goal_offset=[2, 4]").build_task()
    dataset = ShardDataset(data)
    places = {dataset.frames(e, [f])[0].tobytes(): (e, f) for e in range(3) for f in range(9)}
    batches = visited(task, passes=5)
    ahead = {}
    for batch in batches:
        assert len(batch) == 24
        for present, goal in batch.images[:, 0]:
            (episode, frame), (other, later) = (places[picture.numpy().tobytes()] for picture in (present, goal))
            assert other == episode and min(frame + 2, 8) <= later <= min(frame + 4, 8)
            ahead.setdefault((episode, frame), set()).add(later - frame)
    assert set.union(*(found for (_, frame), found in ahead.items() if frame <= 4)) == {2, 3, 4}
    again = visited(small(video, data, tmp_path, "goal_offset=[2, 4]").build_task(), passes=5)
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.noise, b.noise) for a, b in zip(batches, again, strict=True)
    )


def test_without_an_offset_goals_are_as_far_as_in_use(video, data, tmp_path):
    """4 frames at stride 2: the last one is 6 ahead; after the 2 steps of a chunk 4, then a new one comes."""
    assert small(video, data, tmp_path).build_task().goal_offset == (4, 6)
    assert small(video, data, tmp_path, "subgoal_every=2").build_task().goal_offset == (6, 6)


def test_goals_alone_pass_the_autoencoder(video, data, tmp_path):
    real, seen = (
        visited(small(video, data, tmp_path, f"goals={kind}").build_task())[0] for kind in ("real", "reconstructed")
    )
    assert torch.equal(real.images[:, 0, 0], seen.images[:, 0, 0])
    expected = load_video_model(video).reconstruct(real.images[:2, 0, 1].numpy()[:, None])[:, 0]
    assert np.abs(seen.images[:2, 0, 1].numpy().astype(int) - expected).max() <= 1


def test_the_goal_is_the_last_imagined_frame_and_is_renewed_when_due(trained):
    policy = load_susie(f"{trained[0].output}/export")
    assert isinstance(policy, Policy) and policy.action_horizon == 2 and policy.config.subgoal_every == 4
    imagined, seen = [], []
    frames, condition = policy.planner.frames, policy.network.condition

    def watched(observed, *, decision):
        imagined.append((decision, frames(observed, decision=decision)))
        return imagined[-1][1]

    policy.planner.frames = watched
    policy.network.condition = lambda *arguments: (seen.append(arguments[0]), condition(*arguments))[1]
    policy.reset(2)
    for _ in range(5):
        actions = policy.act(observation(["open/3", "press/7"]))
        assert actions.shape == (2, 2, 4) and np.abs(actions).max() <= 1
    assert [decision for decision, _ in imagined] == [0, 2, 4]
    for number, pictures in enumerate(seen):
        assert np.array_equal(pictures[:, 1].numpy(), imagined[number // 2][1][:, -1])
    assert not np.array_equal(imagined[0][1], imagined[1][1])
    assert set(policy.timings) == {"video", "encoder", "denoiser"}


def test_the_sentence_reaches_the_actions_through_the_goal_alone(trained):
    policy = load_susie(f"{trained[0].output}/export")
    before = policy.act(observation(["a"]))
    policy.reset(1)
    assert not np.allclose(policy.act(observation(["a"], text="press the button")), before, atol=1e-5)
    goal = policy._subgoals(observation(["a"]))
    policy.reset(1)
    policy._subgoals = lambda _: goal
    fixed = policy.act(observation(["a"]))
    policy._decision = 0
    assert np.array_equal(policy.act(observation(["a"], text="press the button")), fixed)


def test_an_episodes_actions_do_not_depend_on_its_neighbours(trained):
    policy = load_policy(f"{trained[0].output}/export")
    both = observation(["open/3", "press/7"])
    one = Observation({"main": both.images["main"][1:]}, both.proprioception[1:], both.text[1:], both.keys[1:])
    together = [policy.act(both) for _ in range(3)]
    policy.reset(1)
    for batch in together:
        np.testing.assert_allclose(batch[1:], policy.act(one), atol=1e-4)


def test_the_export_names_its_video_model_and_refuses_another(trained, video, tmp_path):
    config, summary = trained
    url = f"{config.output}/export"
    record = read_record(url)
    assert read_record(video)["digest"] in record["inputs"] and record["digest"] == summary["export"]
    other = make_video_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError) as refusal:
        load_policy(url, provider=other)
    assert "\n" not in str(refusal.value) and read_record(other)["digest"][:12] in str(refusal.value)
    moved = make_video_model(tmp_path / "moved")
    assert np.array_equal(load_susie(url, video=moved).act(observation(["a"])), load_susie(url).act(observation(["a"])))


def test_what_makes_no_sense_is_refused(video, data, tmp_path):
    for assignments, message in (
        (["subgoal_every=3"], "subgoal_every 3 is no multiple of execute 2"),
        (["goal_offset=[4, 2]"], r"goal_offset \(4, 2\) is no rising pair"),
        (['data.cameras=["a", "b"]'], "sees one camera"),
        (["network.execute=5"], "execute 5 exceeds chunk 4"),
        (["network.uses_text=true"], "uses_text"),
    ):
        with pytest.raises(ConfigError, match=message):
            small(video, data, tmp_path, *assignments)
    with pytest.raises(ConfigError, match="crop 40 exceeds image_size 32"):
        small(video, data, tmp_path, "network.crop=40").build_task().build_model()


def test_plan_and_command_know_it(video, data, tmp_path):
    config = small(video, data, tmp_path)
    assert dry_run(config)["parameters"] > 0
    assert parse_config(json.loads(json.dumps(config.to_json()))) == config
