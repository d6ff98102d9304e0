"""Uni-Pi style: inverse dynamics of frame pairs, plans of a video model, and the policy between them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, InputError
from ingest.reader import ShardDataset
from tests.helpers_baselines import fit, make_ruled_dataset, make_video_model, smaller, square_at
from tests.helpers_data import make_episode_dataset
from training.export import load_policy
from training.export_baselines import load_unipi, noise_shape, video_sizes
from training.export_files import read_record
from training.export_video import load_video_model
from training.launch import launch
from training.loop import Group
from training.main import parse_config
from training.models.common.resnet import ResNetConfig
from training.models.inverse_dynamics import InverseDynamicsConfig, InverseDynamicsNetwork, UniPiPolicy
from training.plan import dry_run
from training.protocols import Observation, Policy
from training.recipes import unipi

SIZE = 32


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video_model(tmp_path_factory.mktemp("video"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_ruled_dataset(tmp_path_factory.mktemp("ruled"), num_episodes=3, num_frames=9)


@pytest.fixture(scope="module")
def trained(video, data, tmp_path_factory):
    config = small(video, data, tmp_path_factory.mktemp("trained"), "frames=reconstructed", "execute=4")
    return config, launch(config)


def small(video, data, output, *assignments):
    config = unipi.tiny(video=video, data=data, output=str(output), stride=2)
    return smaller(config, "network.hidden=[32]", "plan.num_steps=2", "frames=real", *assignments)


def all_windows(task):
    count = task.num_clips
    [[batch]] = task.batches(
        steps=range(1), global_batch_size=count, micro_batch_size=count, group=Group(), loader_workers=0
    )
    return batch


def observation(keys, seed=0, text="follow"):
    pictures = np.random.default_rng(seed).integers(0, 256, (len(keys), 40, 40, 3), dtype=np.uint8)
    return Observation({"main": pictures}, np.zeros((len(keys), 4), np.float32), (text,) * len(keys), tuple(keys))


def test_it_learns_which_way_a_square_went():
    torch.manual_seed(0)
    config = InverseDynamicsConfig(
        image_size=SIZE, actions_per_pair=1, action_dim=2, hidden=(64,), loss="mse",
        vision=ResNetConfig(width=8, blocks=(1,), group_channels=4, keypoints=8, feature_dim=32),
    )  # fmt: skip
    network = InverseDynamicsNetwork(config)

    def pairs(count, seed):
        random = np.random.default_rng(seed)
        start, turn = random.uniform(10, 22, (count, 2)), random.uniform(-1, 1, (count, 2))
        frames = [
            [square_at(*place, SIZE), square_at(*(place + 5 * step), SIZE)]
            for place, step in zip(start, turn, strict=True)
        ]
        return torch.from_numpy(np.array(frames)), torch.from_numpy(turn).float()[:, None]

    fit(network, lambda step: network.loss(*pairs(64, step)), steps=150)
    frames, turn = pairs(128, 10_000)
    with torch.no_grad():
        assert network.loss(frames, turn) < 0.15 * turn.square().mean()
        backwards = network(frames.flip(1))
    assert (backwards * turn).mean() < -0.15  # the other way round it is the other way


@pytest.mark.parametrize("last_frame_has_action", [False, True])
def test_a_pair_is_two_frames_of_an_episode_and_the_actions_between_them(video, tmp_path, last_frame_has_action):
    data = make_episode_dataset(
        tmp_path / "data", num_episodes=2, num_frames=7, size=SIZE, last_frame_has_action=last_frame_has_action
    )
    task = small(video, data, tmp_path / "run").build_task()
    batch = all_windows(task)
    assert task.num_clips == 2 * 5  # pairs (0, 2) to (4, 6)
    dataset = ShardDataset(data)
    frames = {dataset.frames(e, [f])[0].tobytes(): (e, f) for e in range(2) for f in range(7)}
    for pair, targets in zip(batch.images[:, 0], batch.targets, strict=True):
        (episode, first), (other, second) = (frames[picture.numpy().tobytes()] for picture in pair)
        assert (other, second) == (episode, first + 2)
        actions = torch.from_numpy(task.episodes[episode].actions[None, first : first + 2])
        assert torch.equal(targets, task.codec.encode(actions, torch.zeros(1, 4))[0])
    assert batch.mask.all()


def test_reconstructed_pairs_have_passed_the_video_models_autoencoder(video, data, tmp_path):
    model = load_video_model(video)
    real, seen = (
        all_windows(small(video, data, tmp_path, f"frames={kind}").build_task()) for kind in ("real", "reconstructed")
    )
    expected = model.reconstruct(real.images[:3, 0, 1].numpy()[:, None])[:, 0]
    difference = seen.images[:3, 0, 1].numpy().astype(int) - expected
    assert np.abs(difference).max() <= 1  # batches of another size may round another way
    assert np.abs(real.images.int() - seen.images.int()).float().mean() > 5
    with pytest.raises(ConfigError, match=r"data.memory_bytes is 10"):
        all_windows(small(video, data, tmp_path, "frames=reconstructed", "data.memory_bytes=10").build_task())


def test_the_policy_acts_what_lies_between_the_frames_of_its_plan(trained, video):
    policy = load_unipi(f"{trained[0].output}/export")
    model = load_video_model(video)
    seen = observation(["open/3", "press/7"])
    policy.reset(2)
    actions = policy.act(seen)
    plan = policy.planner.frames(seen, decision=0)
    assert plan.shape == (2, 4, SIZE, SIZE, 3) and noise_shape(model) == (4, 4, 8, 8)
    assert not np.array_equal(plan, policy.planner.frames(seen, decision=1))
    codec, network = policy.config.codec, policy.network
    for row in range(2):
        pairs = torch.from_numpy(np.stack([plan[row, 0:2], plan[row, 1:3]]))
        expected = codec.decode(network(pairs), torch.zeros(2, 4)).flatten(0, 1)
        np.testing.assert_allclose(actions[row], expected.numpy(), atol=1e-5)
    assert set(policy.timings) == {"video", "inverse_dynamics"}


def test_a_plan_follows_from_its_episode_and_decision_alone(trained):
    policy = load_policy(f"{trained[0].output}/export")
    assert isinstance(policy, Policy) and policy.cameras == ("main",) and policy.action_horizon == 4
    both = observation(["open/3", "press/7"])
    one = Observation({"main": both.images["main"][1:]}, both.proprioception[1:], both.text[1:], both.keys[1:])
    together = [policy.act(both) for _ in range(2)]
    policy.reset(1)
    single = [policy.act(one) for _ in range(2)]
    for batch, alone in zip(together, single, strict=True):
        assert batch.shape == (2, 4, 4) and np.abs(batch).max() <= 1
        np.testing.assert_allclose(batch[1:], alone, atol=1e-4)
    assert not np.allclose(single[0], single[1], atol=1e-5)
    policy.reset(1)
    assert np.array_equal(policy.act(one), single[0])
    policy.reset(1)
    assert not np.allclose(policy.act(observation(["press/7"], seed=5)), single[0], atol=1e-5)


def test_the_export_names_its_video_model_and_refuses_another(trained, video, tmp_path):
    config, summary = trained
    url = f"{config.output}/export"
    record = read_record(url)
    assert read_record(video)["digest"] in record["inputs"] and record["digest"] == summary["export"]
    weights = torch.cat([value.flatten() for value in load_unipi(url).network.state_dict().values()])
    assert len(weights) == sum(value.numel() for value in config.build_task().build_model().state_dict().values())
    other = make_video_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError) as refusal:
        load_policy(url, provider=other)
    said = str(refusal.value)
    assert "\n" not in said
    assert read_record(video)["digest"][:12] in said and read_record(other)["digest"][:12] in said
    moved = make_video_model(tmp_path / "moved")
    seen = observation(["a"])
    assert np.array_equal(load_unipi(url, video=moved).act(seen), load_unipi(url).act(seen))
    with pytest.raises(InputError, match="is a 'tvp' export"):
        load_unipi(video)


def test_only_what_a_plan_can_tell_is_promised(trained, video, data, tmp_path):
    for assignments, message in (
        (["plan.stride=3"], "plan.stride 3 is not network.actions_per_pair 2"),
        (["proprioception=true", "execute=3"], "execute 3 reaches beyond the first pair"),
        (["codec.transform=xhand"], "codec.transform 'xhand' needs states"),
        (['data.cameras=["a", "b"]'], "sees one camera"),
    ):
        with pytest.raises(ConfigError, match=message):
            small(video, data, tmp_path, *assignments)
    with pytest.raises(ConfigError, match="a plan of 4 frames has 6 actions"):
        small(video, data, tmp_path, "execute=7").build_task()
    felt = small(video, data, tmp_path, "proprioception=true").build_task()
    assert felt.network_config.proprioception_dim == 4
    with pytest.raises(InputError, match="is a 'unipi-policy' export"):
        video_sizes(f"{trained[0].output}/export")


def test_plan_and_command_know_it(video, data, tmp_path):
    config = small(video, data, tmp_path)
    assert dry_run(config)["parameters"] > 0
    assert parse_config(json.loads(json.dumps(config.to_json()))) == config


def test_a_policy_of_another_size_than_its_video_model_is_refused(trained, video):
    policy = load_unipi(f"{trained[0].output}/export")
    stored = policy.config.model_copy(update={"network": policy.config.network.model_copy(update={"image_size": 16})})
    model = load_video_model(video)
    with pytest.raises(InputError, match="16 pixels on frames of 32"):
        UniPiPolicy(policy.network, model, stored, noise_shape=noise_shape(model))
    missing = Observation({"top": np.zeros((1, 8, 8, 3), np.uint8)}, np.zeros((1, 4), np.float32), ("",))
    with pytest.raises(InputError, match=r"needs camera 'main', the observation has \['top'\]"):
        policy.act(missing)
