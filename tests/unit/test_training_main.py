"""The command of a training job, the plan it can give instead, and the policy recipe from data set to export."""

import json

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, ForeframeError
from tests.helpers_data import make_episode_dataset, make_frames_dataset
from tests.helpers_training import small_pretrain
from training.export import load_encoder, load_policy, read_record
from training.launch import launch
from training.main import main, parse_config
from training.plan import dry_run
from training.protocols import Observation
from training.recipes import policy, rsp
from training.recipes.policy import ProviderConfig


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return make_frames_dataset(tmp_path_factory.mktemp("frames"), num_clips=6, num_frames=20, size=40)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    return make_episode_dataset(tmp_path_factory.mktemp("episodes"), num_episodes=3, num_frames=12, size=40)


@pytest.fixture(scope="module")
def encoder(frames, tmp_path_factory):
    output = tmp_path_factory.mktemp("encoder")
    launch(small_pretrain(frames, output, "schedule.steps=4"))
    return str(output / "export")


def small_policy(provider, episodes, output, **changes):
    config = policy.tiny(provider=provider, data=episodes, output=str(output))
    changes = {
        "schedule": {"epochs": None, "warmup_epochs": 0, "steps": 40},
        "global_batch_size": 16,
        "compute": {"workers": 0, "matmul": "default"},
        **changes,
    }
    return type(config).parse(config.to_json() | changes)


def test_the_command_trains_exports_and_does_nothing_the_second_time(frames, tmp_path, caplog):
    path = tmp_path / "job.json"
    small_pretrain(frames, tmp_path / "run", "schedule.steps=4").save(path)
    assert main([str(path)]) == 0
    assert load_encoder(tmp_path / "run" / "export").embed_dim == 16
    with caplog.at_level("INFO"):
        assert main([str(path)]) == 0
    assert "is complete" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"kind": "pretrain-rps"}', "unknown kind 'pretrain-rps'"),
        ('{"kind": "pretrain-rsp", "output": "o", "data": {"url": "d"}, "optim": {"base_rl": 1}}', "'base_lr'"),
        ("[]", "not an object"),
        ("{", "not JSON"),
    ],
)
def test_a_wrong_job_file_is_one_line_and_exit_code_2(tmp_path, capsys, text, words):
    path = tmp_path / "job.json"
    path.write_text(text)
    assert main([str(path)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line
    with pytest.raises(ForeframeError):
        main([str(path), "--debug"])


def test_the_plan_of_the_papers_run_on_their_data_set(frames, tmp_path, monkeypatch):
    config = rsp.vits16(data=frames, output=str(tmp_path / "run"))
    monkeypatch.setattr("training.recipes.rsp.FramePairDataset.__len__", lambda _: 240_000)
    plan = dry_run(config)
    assert (plan["steps"], plan["passes"], plan["effective_epochs"]) == (31_250, 200, 400)
    assert plan["peak_lr"] == pytest.approx(9e-4)
    assert plan["parameters"] == pytest.approx(59.006e6, abs=1e3)
    assert (plan["workers"], plan["micro_batch_clips"], plan["micro_batches_per_step"]) == (8, 64, 3)
    assert plan["worker_memory_bytes"]["model_and_optimiser"] == 16 * plan["parameters"]
    assert not (tmp_path / "run").exists()


def test_planned_activations_are_what_autograd_keeps(frames, tmp_path):
    config = small_pretrain(frames, tmp_path, "precision=float32")
    planned = dry_run(config)["worker_memory_bytes"]["activations"]
    task = config.build_task()
    model = task.build_model()
    kept = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    batch = task.example(config.global_batch_size)
    batch = type(batch)(torch.zeros(batch.images.shape, dtype=torch.uint8), batch.visits, batch.repeats)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(model, batch, torch.device("cpu"))
    assert planned == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.15)


@pytest.mark.parametrize("kind", ["export", "random", "none"])
@pytest.mark.parametrize("feature", ["class_token", "patch_tokens"])
def test_a_policy_is_trained_on_each_provider_and_acts(episodes, encoder, tmp_path, kind, feature):
    provider = ProviderConfig(kind=kind, url="" if kind == "none" else encoder, feature=feature)
    config = small_policy(provider, episodes, tmp_path)
    summary = launch(config)
    assert summary["last"]["loss"] < summary["first"]["loss"]
    trained = load_policy(tmp_path / "export")
    assert trained.needs_images == (kind != "none")
    images = {"main": np.zeros((2, 40, 40, 3), np.uint8)} if trained.needs_images else {}
    trained.reset(2)
    actions = trained.act(Observation(images, np.zeros((2, 4), np.float32), ("move the square",) * 2))
    assert actions.shape == (2, 4, 4) and np.abs(actions).max() <= 1
    inputs = read_record(tmp_path / "export")["inputs"]
    assert (read_record(encoder)["digest"] in inputs) == (kind == "export")
    assert dry_run(config)["parameters"] > 0


def test_the_cortexbench_recipe_trains(episodes, encoder, tmp_path):
    config = policy.cortexbench(provider=ProviderConfig(url=encoder), data=episodes, output=str(tmp_path))
    smaller = {"global_batch_size": 16, "compute": {"workers": 0}, "schedule": {"epochs": 5, "warmup_epochs": 0}}
    summary = launch(type(config).parse(config.to_json() | smaller))
    assert summary["steps"] == 5 * 33 // 16
    assert load_policy(tmp_path / "export").action_horizon == 1


def test_statistics_of_the_training_set_are_in_the_policy(episodes, tmp_path):
    config = small_policy(ProviderConfig(kind="none"), episodes, tmp_path)
    task = config.build_task()
    model = task.build_model()
    task.prepare(model)
    assert not torch.equal(model.proprioception_mean, torch.zeros(4))
    assert not torch.equal(model.action_std, torch.ones(4))


def test_a_provider_without_its_export_is_refused():
    for value in ({"kind": "export"}, {"kind": "none", "url": "x"}, {"kind": "pixels"}):
        with pytest.raises(ConfigError):
            ProviderConfig.parse(value)


def test_both_kinds_are_known(frames, episodes, tmp_path):
    pretrain = small_pretrain(frames, tmp_path)
    cloning = small_policy(ProviderConfig(kind="none"), episodes, tmp_path)
    for config in (pretrain, cloning):
        assert parse_config(json.loads(json.dumps(config.to_json()))) == config
