"""Diffusion Policy: what it learns from, its closed loop, its recipe from data set to export."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, InputError
from infra.tracking import flatten
from ingest.reader import ShardDataset
from tests.helpers_baselines import SMALL_CHUNK, fit, make_ruled_dataset, smaller, square_at
from tests.helpers_data import make_episode_dataset
from training.checkpoint import newest_valid, read_checkpoint
from training.data.episodes import load_episodes
from training.data.picture_windows import EpisodePictures
from training.export import load_policy
from training.export_baselines import load_diffusion_policy
from training.launch import launch
from training.loop import Group
from training.main import parse_config
from training.models.common.pictures import resized
from training.models.common.resnet import ResNetConfig
from training.models.common.unet1d import UNet1DConfig
from training.models.diffusion_policy import (
    DiffusionPolicy,
    DiffusionPolicyConfig,
    DiffusionPolicyNetwork,
    StoredDiffusionPolicy,
)
from training.plan import dry_run
from training.protocols import Observation, Policy
from training.recipes import diffusion_policy
from training.recipes.diffusion_policy import DiffusionPolicyTask

SIZE = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_ruled_dataset(tmp_path_factory.mktemp("ruled"), num_episodes=3, num_frames=9)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    return small(data, output), launch(small(data, output))


def small(data, output, *assignments):
    config = diffusion_policy.tiny(data=data, output=str(output))
    sizes = (f"network.image_size={SIZE}", "network.crop=28", "network.history=2")
    return smaller(config, *SMALL_CHUNK, *sizes, *assignments)


def batches_of(task, *, steps=range(1), size=8):
    loaded = task.batches(steps=steps, global_batch_size=size, micro_batch_size=size, group=Group(), loader_workers=0)
    return [batch for [batch] in loaded]


def observation(keys, seed=0):
    random = np.random.default_rng(seed)
    pictures = random.integers(0, 256, (len(keys), 40, 40, 3), dtype=np.uint8)
    state = random.normal(size=(len(keys), 4)).astype(np.float32)
    return Observation({"main": pictures}, state, ("follow",) * len(keys), tuple(keys))


def test_it_learns_to_act_on_what_it_sees():
    """The first action is the square's column, the second its row: the samples must say so for places never shown."""
    torch.manual_seed(0)
    config = DiffusionPolicyConfig(
        image_size=SIZE, crop=0, history=1, chunk=4, execute=2, action_dim=2, proprioception_dim=0, text_dim=0,
        vision=ResNetConfig(width=8, blocks=(1,), group_channels=4, keypoints=8, feature_dim=16),
        unet=UNet1DConfig(channels=(32, 32), step_dim=16),
    )  # fmt: skip
    network = DiffusionPolicyNetwork(config)

    def pictures(count, seed):
        places = np.random.default_rng(seed).uniform(-0.7, 0.7, (count, 2))
        shown = np.stack([square_at(*(SIZE / 2 * (1 + place)), SIZE) for place in places])
        targets = torch.from_numpy(places).float()[:, None].expand(-1, 4, -1)
        return torch.from_numpy(shown)[:, None, None], targets, torch.zeros(count, 1, 0), torch.zeros(count, 0)

    def loss_of(step):
        images, targets, states, text = pictures(32, step)
        steps, noise = torch.randint(100, (32,)), torch.randn(32, 4, 2)
        return network.loss(images, states, text, targets_BKD=targets, steps_B=steps, noise_BKD=noise)

    losses = fit(network, loss_of, steps=250)
    assert np.mean(losses[-20:]) < 0.3 * losses[0]
    images, targets, states, text = pictures(64, 10_000)
    sampled = network.head.sample(network.condition(images, states, text), torch.randn(64, 1, 4, 2))
    error = (sampled - targets).square().mean()
    assert error < 0.3 * targets.square().mean(), float(error)


def test_a_sentence_and_the_own_state_change_the_actions(trained):
    policy = load_diffusion_policy(f"{trained[0].output}/export")
    seen = observation(["a/0"])
    first = policy.act(seen)
    for changed in (
        Observation(seen.images, seen.proprioception + 0.1, seen.text, seen.keys),
        Observation(seen.images, seen.proprioception, ("press the button",), seen.keys),
        observation(["a/0"], seed=1),
    ):
        policy.reset(1)
        assert not np.allclose(policy.act(changed), first, atol=1e-4)


def test_training_and_closed_loop_see_the_same(data, tmp_path):
    """Pictures, states and sentence of decisions 0, 2, 4 of an episode, oldest first; before it the first stands in."""
    config = small(data, tmp_path, "network.crop=0")
    task = config.build_task()
    torch.manual_seed(0)
    network = task.build_model()
    policy = DiffusionPolicy(network, StoredDiffusionPolicy(network=network.config, codec=task.codec))
    trained_on = batches_of(task, steps=range(3))
    assert sum(len(batch) for batch in trained_on) == task.num_clips == 24  # one pass: every window once
    by_picture = {
        window.numpy().tobytes(): (batch, row) for batch in trained_on for row, window in enumerate(batch.images)
    }
    seen = []
    forward = network.condition
    network.condition = lambda *arguments: (seen.append(arguments), forward(*arguments))[1]
    dataset, episode = ShardDataset(data), task.episodes[1]
    policy.reset(1)
    for frame in (0, 2, 4):
        pictures = {"main": dataset.frames(1, [frame])}
        policy.act(Observation(pictures, episode.proprioception[frame : frame + 1], ("follow",)))
        images, states, text = seen[-1]
        batch, row = by_picture[images[0].numpy().tobytes()]
        assert torch.equal(states[0], batch.states[row]) and torch.equal(text[0], batch.text[row])
        expected = dataset.frames(1, [max(frame - 2, 0), frame])
        assert np.array_equal(images[0, 0].numpy(), expected)
        encoded = task.codec.encode(torch.from_numpy(episode.actions[None, frame : frame + 4]), states[:, -1])
        assert torch.equal(encoded[0], batch.targets[row, : encoded.shape[1]])


def test_crops_move_in_training_and_are_central_in_use(data, tmp_path):
    task = small(data, tmp_path, "network.crop=20", "network.history=1").build_task()
    [first] = batches_of(task, size=24)
    [again] = batches_of(small(data, tmp_path, "network.crop=20", "network.history=1").build_task(), size=24)
    assert torch.equal(first.images, again.images) and first.images.shape[-3:] == (20, 20, 3)
    whole = batches_of(small(data, tmp_path, "network.crop=0", "network.history=1").build_task(), size=24)[0].images
    corners = set()
    for window, cut in zip(whole[:, 0, 0], first.images[:, 0, 0], strict=True):
        places = [
            (top, left)
            for top in range(13)
            for left in range(13)
            if torch.equal(window[top : top + 20, left : left + 20], cut)
        ]
        assert places
        corners.add(places[0])
    assert len(corners) > 10
    model = task.build_model()
    policy = DiffusionPolicy(model, StoredDiffusionPolicy(network=model.config, codec=task.codec))
    seen = []
    model.encoders[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    picture = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    policy.act(Observation({"main": picture}, np.zeros((1, 4), np.float32), ("",)))
    middle = torch.from_numpy(picture[:, 6:26, 6:26]).permute(0, 3, 1, 2)
    torch.testing.assert_close(seen[0], middle / 127.5 - 1)


def test_pictures_from_memory_and_from_disk_are_equal(data):
    dataset = ShardDataset(data)
    episodes = load_episodes(dataset)
    places = [(2, 8), (0, 0), (1, 5)]
    stores = [
        EpisodePictures(dataset, episodes, cameras=("main",), size=24, antialias=True, memory_bytes=limit)
        for limit in (0, 10**9)
    ]
    for store in stores:
        store.load()
    assert [store.in_memory for store in stores] == [False, True]
    assert stores[1].num_bytes == 27 * 24 * 24 * 3
    expected = np.stack([resized(dataset.frames(e, [f]), 24, antialias=True) for e, f in places])
    for store in stores:
        assert np.array_equal(store.get(places), expected)


def test_loader_processes_change_nothing(data, tmp_path):
    config = small(data, tmp_path)
    expected = batches_of(config.build_task(), steps=range(2))
    task = small(data, tmp_path, "data.memory_bytes=0").build_task()
    found = task.batches(steps=range(2), global_batch_size=8, micro_batch_size=4, group=Group(), loader_workers=1)
    for whole, parts in zip(expected, found, strict=True):
        assert [len(part) for part in parts] == [4, 4]
        for name, value in whole.tensors().items():
            assert torch.equal(value, torch.cat([part.tensors()[name] for part in parts])), name


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_episodes_actions_do_not_depend_on_its_neighbours(trained, sampler):
    policy = load_diffusion_policy(f"{trained[0].output}/export")
    network = policy.config.network
    diffusion = network.diffusion.model_copy(update={"sampler": sampler})
    stored = policy.config.model_copy(update={"network": network.model_copy(update={"diffusion": diffusion})})
    policy.network.head.config = diffusion
    policy = DiffusionPolicy(policy.network, stored)
    both = observation(["open/3", "press/7"])
    alone = Observation({"main": both.images["main"][1:]}, both.proprioception[1:], both.text[1:], both.keys[1:])
    policy.reset(2)
    together = [policy.act(both) for _ in range(3)]
    policy.reset(1)
    single = [policy.act(alone) for _ in range(3)]
    for batch, one in zip(together, single, strict=True):
        np.testing.assert_allclose(batch[1:], one, atol=1e-5)
    assert not np.allclose(single[1], single[2], atol=1e-4)  # equal pictures, another decision, another draw
    assert set(policy.timings) == {"encoder", "denoiser"}


def test_the_export_acts_as_the_trained_model(trained):
    config, summary = trained
    assert summary["steps"] == 12
    url = f"{config.output}/export"
    policy = load_policy(url)
    assert isinstance(policy, Policy) and policy.needs_images and policy.cameras == ("main",)
    seen = observation(["open/3", "press/7"])
    policy.reset(2)
    actions = policy.act(seen)
    assert actions.shape == (2, 2, 4) and actions.dtype == np.float32 and np.abs(actions).max() <= 1
    files, _ = read_checkpoint(newest_valid(config.checkpoints_url()))
    task = config.build_task()
    model = task.build_model()
    model.load_state_dict(files["model"] | files["average"])
    stored = StoredDiffusionPolicy(network=model.config, codec=task.codec)
    assert np.array_equal(DiffusionPolicy(model, stored).act(seen), actions)
    assert policy.config == stored


def test_a_run_that_was_cut_off_goes_on_to_the_last_bit(data, trained, tmp_path, monkeypatch):
    config, calls = small(data, tmp_path), []
    loss = DiffusionPolicyTask.loss

    def stopping(self, *arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DiffusionPolicyTask, "loss", stopping)
        launch(config)
    assert newest_valid(config.checkpoints_url()).endswith("5")
    summary = launch(config)
    assert summary["execution"]["first_step"] == 5
    assert summary["export"] == trained[1]["export"]  # the digest covers weights and config


def test_the_tiny_preset_differs_from_the_published_one_in_sizes_and_counts_only():
    published = flatten(diffusion_policy.paper(data="d", output="o").to_json())
    tiny = flatten(diffusion_policy.tiny(data="d", output="o").to_json())
    different = {key for key in published.keys() | tiny.keys() if published.get(key) != tiny.get(key)}
    allowed = diffusion_policy.SIZES_AND_COUNTS
    assert {"optim.lr", "network.image_size"} <= different
    assert not {key for key in different if not any(f"{key}.".startswith(f"{ok}.") for ok in allowed)}


def test_the_plan_counts_the_published_network(tmp_path):
    episodes = make_episode_dataset(tmp_path / "data", num_episodes=2, num_frames=20, size=16)
    plan = dry_run(diffusion_policy.paper(data=episodes, output=str(tmp_path / "run")))
    with torch.device("meta"):
        network = DiffusionPolicyNetwork(DiffusionPolicyConfig())
    assert plan["parameters"] == sum(weight.numel() for weight in network.parameters())
    assert plan["steps"] == 100_000


def test_what_makes_no_sense_is_refused_in_one_line(trained):
    for changes, message in (
        ({"execute": 17}, "execute 17 exceeds chunk 16"),
        ({"chunk": 18, "execute": 4}, "chunk 18 does not divide by the UNet's 4"),
        ({"crop": 90}, "crop 90 exceeds image_size 84"),
    ):
        with pytest.raises(ConfigError, match=message):
            DiffusionPolicyConfig.parse(changes)
    policy = load_diffusion_policy(f"{trained[0].output}/export")
    with pytest.raises(InputError, match=r"needs camera main, the observation has \['top'\]"):
        policy.act(Observation({"top": np.zeros((1, 8, 8, 3), np.uint8)}, np.zeros((1, 4), np.float32), ("",)))
    policy.act(observation(["a", "b"]))
    with pytest.raises(InputError, match="batch of 1 after one of 2"):
        policy.act(observation(["a"]))


def test_the_command_knows_it(data, tmp_path):
    config = small(data, tmp_path)
    assert parse_config(json.loads(json.dumps(config.to_json()))) == config
