"""The recipe of the Video Prediction Policy: presets, what is learned from, resuming, and the exported policy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.config import override
from infra.errors import ConfigError, InputError
from tests.helpers_data import make_episode_dataset
from tests.helpers_models import export_rsp, perturbed
from training.export import load_policy
from training.export_policies import save_vpp
from training.feature_cache import FeatureCacheConfig
from training.feature_cache_build import run as fill_cache
from training.launch import launch
from training.loop import Group
from training.models.common.text import SentenceEncoder
from training.protocols import Observation
from training.providers import EncoderProviderConfig
from training.recipes import vpp
from training.recipes.vpp import VPPRunConfig

SMALL = (
    "former.dim=32", "former.depth=1", "former.num_latents=2", "former.num_heads=2", "former.head_dim=8",
    "denoiser.dim=32", "denoiser.num_heads=2", "denoiser.encoder_layers=1", "denoiser.decoder_layers=1",
    "global_batch_size=8", "schedule.steps=6", "checkpoint.every_steps=2", "log_every_steps=1",
    "validation.every_steps=3", "validation.decisions=6", "validation.batch_size=4", "compute.matmul=default",
)  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    data = make_episode_dataset(
        folder / "data", num_episodes=20, num_frames=9, size=32, validation_every=5, actions_follow_state=True
    )
    export_rsp(folder / "encoder", perturbed())
    return {"data": data, "encoder": str(folder / "encoder")}


def provider(parts: dict[str, str]) -> EncoderProviderConfig:
    return EncoderProviderConfig(url=parts["encoder"])


def small(parts: dict[str, str], output: Path, *changes: str, blind: bool = False) -> VPPRunConfig:
    base = vpp.tiny(provider=None if blind else provider(parts), data=parts["data"], output=str(output))
    return override(base, [*SMALL, *changes])


def cached(parts: dict[str, str], folder: Path, **changes: object) -> str:
    wanted = {"data": parts["data"], "provider": provider(parts), "split": "train", "every": 2, "workers": 0}
    fill_cache(FeatureCacheConfig(**(wanted | changes), output=str(folder)))
    return str(folder)


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def batches(config: VPPRunConfig, *, steps: range, group: Group | None = None, workers: int = 0) -> list:
    task = config.build_task()
    made = task.batches(
        steps=steps, global_batch_size=8, micro_batch_size=4, group=group or Group(), loader_workers=workers
    )
    return [part for parts_ in made for part in parts_]


def test_tiny_differs_from_metaworld_in_sizes_counts_and_one_learning_rate():
    whole = flatten(vpp.metaworld(provider=None, data="d", output="o").to_json())
    tiny = flatten(vpp.tiny(provider=None, data="e", output="p").to_json())
    different = {key for key in whole.keys() | tiny.keys() if whole.get(key) != tiny.get(key)}
    assert {"optim.lr", "schedule.steps"} <= different
    assert {key for key in different if not any(f"{key}.".startswith(f"{ok}.") for ok in vpp.SIZES_AND_COUNTS)} == set()


def test_the_calvin_preset_has_the_released_numbers():
    config = vpp.calvin(provider=None, data="d", output="o")
    optim = config.optim
    assert (optim.lr, optim.betas, optim.weight_decay, optim.decay) == (1e-4, (0.9, 0.9), 0.05, "all")
    assert (config.schedule.shape, config.schedule.epochs, optim.ema_decay, optim.clip_norm) == (
        "constant",
        50,
        None,
        None,
    )
    assert (config.global_batch_size, config.compute.workers) == (112, 4)
    assert (config.former.dim, config.former.depth, config.former.num_latents) == (384, 6, 14)
    assert (config.denoiser.dim, config.denoiser.encoder_layers, config.denoiser.decoder_layers) == (384, 4, 4)
    assert (config.denoiser.chunk, config.execute, config.data.least) == (10, 10, 21)
    assert (config.sampling.sampler, config.sampling.num_steps, config.sampling.sigma_min) == ("ddim", 10, 1.0)
    assert not config.data.proprioception and not config.standardise and config.codec.binary == (6,)


def test_the_hands_loss_counts_its_parts_as_released():
    config = vpp.xhand(provider=None, data="d", output="o")
    assert config.loss_weights == (2,) * 6 + (1,) * 12
    assert (config.codec.transform, config.codec.scaling, config.codec.percentiles) == ("xhand", "bounds", (1, 99))
    assert not config.denoiser.train_proprioception
    assert (config.denoiser.chunk, config.execute, config.schedule.epochs) == (8, 8, 500)
    with_clip = vpp.xhand(provider=None, data="d", output="o", clip="/models/clip").text
    assert (with_clip.kind, with_clip.path) == ("clip", "/models/clip")


@pytest.mark.parametrize(("changes", "words"), [
    (["execute=9"], "execute 9 exceeds denoiser.chunk 8"),
    (["validation.every_steps=100", "log_every_steps=30"], "no multiple of log_every_steps 30"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        override(vpp.tiny(provider=None, data="d", output="o"), changes)


def test_what_is_learned_from_does_not_depend_on_ranks_or_workers(parts, tmp_path):
    config = small(parts, tmp_path)
    whole = batches(config, steps=range(1, 3))
    ranks = [batches(config, steps=range(1, 3), group=Group(rank, 2)) for rank in range(2)]
    shared = [batch for step in range(2) for rank in ranks for batch in rank[step : step + 1]]
    for one, other in zip(whole, shared, strict=True):
        assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())
    again = batches(config, steps=range(1, 3), workers=1)
    assert all(
        torch.equal(a.noise, b.noise) and torch.equal(a.images, b.images) for a, b in zip(whole, again, strict=True)
    )
    assert not torch.equal(whole[0].noise, whole[1].noise)


def test_cached_features_give_the_same_losses_as_pixels(parts, tmp_path):
    features = cached(parts, tmp_path / "cache", dtype="float32")
    pixels, cache = (
        launch(small(parts, tmp_path / name, f"data.features={url}"))
        for name, url in (("pixels", ""), ("cached", features))
    )
    assert cache["last"]["loss"] == pytest.approx(pixels["last"]["loss"], rel=1e-4)
    assert cache["validation_action_mse"] == pytest.approx(pixels["validation_action_mse"], rel=1e-3)


def test_a_cache_of_another_provider_is_refused(parts, tmp_path):
    other = EncoderProviderConfig(url=parts["encoder"], feature="class_token")
    features = cached(parts, tmp_path / "cache", provider=other)
    with pytest.raises(InputError, match="provider"):
        launch(small(parts, tmp_path / "run", f"data.features={features}"))


def test_it_learns_and_says_so_on_held_out_decisions(parts, tmp_path):
    config = small(
        parts,
        tmp_path / "run",
        "schedule.steps=120",
        "data.every=1",
        "optim.lr=3e-3",
        "optim.ema_decay=0.9",
        "checkpoint.every_steps=120",
        "validation.every_steps=40",
    )
    summary = launch(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rated = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in rated] == [1, 40, 80, 120]
    assert rated[-1]["validation_action_mse"] < 0.8 * rated[0]["validation_action_mse"]
    # The average is what is exported, and it was rated beside the weights.
    assert summary["validation_loss"] == pytest.approx(rated[-1]["validation_average_loss"], rel=1e-5)
    assert rated[-1]["validation_average_loss"] != rated[-1]["validation_loss"]


def test_the_exported_policy_acts_by_keys_not_by_places(parts, tmp_path):
    launch(small(parts, tmp_path / "run"))
    policy = load_policy(tmp_path / "run" / "export")
    draw = np.random.default_rng(0)
    images = {"main": draw.integers(0, 255, (2, 32, 32, 3), np.uint8)}
    state = draw.normal(size=(2, 4)).astype(np.float32)
    seen = Observation(images, state, ("push", "pull"), ("a", "b"))
    policy.reset(2)
    first, second = policy.act(seen), policy.act(seen)
    assert first.shape == (2, 4, 4) and np.abs(first).max() <= 1
    assert not np.allclose(first, second)  # another decision draws anew
    assert {"features", "video_former", "action_denoiser"} == set(policy.timings)
    turned = Observation({"main": images["main"][::-1]}, state[::-1], ("pull", "push"), ("b", "a"))
    policy.reset(2)
    np.testing.assert_allclose(policy.act(turned)[::-1], first, atol=1e-5)


def test_a_policy_whose_sentences_are_encoded_otherwise_is_refused(parts, tmp_path):
    task = small(parts, tmp_path / "run").build_task()
    mine = SentenceEncoder().digest
    assert task.policy_config.text_digest == mine
    foreign = task.policy_config.model_copy(update={"text_digest": "e" * 64})  # trained with other files in that folder
    save_vpp(tmp_path / "export", task.build_model(), foreign, references=task.references, facts={}, inputs=())
    with pytest.raises(InputError, match=f"sentences of encoder eeeeeeeeeeee, .* is {mine[:12]}"):
        load_policy(tmp_path / "export")


def test_where_features_lie_is_not_what_is_learned_but_what_they_are_is(parts, tmp_path):
    here, there = (cached(parts, tmp_path / name) for name in ("here", "there"))
    drawn = cached(parts, tmp_path / "drawn", dtype="float32")
    runs = [small(parts, tmp_path / "run", f"data.features={url}") for url in (here, there, drawn)]
    assert len({run.identity_digest() for run in runs}) == 1
    digests = [run.build_task().data_digest for run in runs]
    assert digests[0] == digests[1] != digests[2]
    # A cache that is larger than its budget is read from the disk, with the same batches.
    small_budget = override(runs[0], ["data.memory_bytes=1"])
    first, second = (batches(run, steps=range(1))[0] for run in (runs[0], small_budget))
    assert torch.equal(first.features, second.features)


def test_a_policy_without_pictures_is_the_same_recipe(parts, tmp_path):
    launch(small(parts, tmp_path / "run", blind=True))
    policy = load_policy(tmp_path / "run" / "export")
    assert not policy.needs_images
    assert policy.act(Observation({}, np.zeros((3, 4), np.float32), ("push",) * 3)).shape == (3, 4, 4)


def test_an_export_whose_encoder_changed_is_refused(parts, tmp_path):
    launch(small(parts, tmp_path / "run"))
    moved = tmp_path / "encoder"
    export_rsp(moved, perturbed())
    assert load_policy(tmp_path / "run" / "export", provider=str(moved)).needs_images
    other = perturbed()
    with torch.no_grad():
        other.norm.bias.add_(1)
    export_rsp(moved, other)
    with pytest.raises(InputError, match=str(moved)):
        load_policy(tmp_path / "run" / "export", provider=str(moved))


def test_a_tenth_of_the_episodes_is_drawn_by_seed(parts, tmp_path):
    def chosen(*changes: str) -> set[int]:
        task = small(parts, tmp_path, *changes, blind=True).build_task()
        return {episode.index for episode in task._episodes}

    assert len(chosen("data.share=0.5")) == 8
    assert chosen("data.share=0.5") == chosen("data.share=0.5")
    assert len({frozenset(chosen("data.share=0.5", f"data.seed={seed}")) for seed in range(8)}) > 1
