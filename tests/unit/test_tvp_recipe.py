"""Fine-tuning of a text-guided video model: presets, what is refused, and what its loss is made of."""

import copy
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from infra.config import override
from infra.errors import ConfigError, InputError
from infra.tracking import flatten
from ingest.windows import ClipSource
from tests.helpers_cache import config_of, make_vae
from tests.helpers_finetune import make_parts, small_finetune, source_of_clips
from training import cache_build
from training.data.video_clips import to_model_range
from training.export_files import read_record
from training.export_video import load_vae, load_video_model, load_video_weights
from training.launch import launch
from training.loop import Group, LoopPlan, accumulate_gradients
from training.main import parse_config
from training.models.tvp import encode_text
from training.optim import Schedule
from training.previews import contact_sheet, side_by_side, spread_clips, write_previews
from training.protocols import VideoPredictor
from training.recipes import tvp
from training.session import new_state, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    """(config, summary) of a finished small run from pixels."""
    config = small_finetune(parts, tmp_path_factory.mktemp("trained"), "precision=float32")
    return config, launch(config)


def one_batch(task, size=4):
    steps, group = range(1), Group()
    [batch] = next(
        iter(task.batches(steps=steps, global_batch_size=size, micro_batch_size=size, group=group, loader_workers=0))
    )
    return batch


def model_of(task, seed=3):
    """A model whose every weight is off its start: zero-initialised layers would hide what goes into them."""
    torch.manual_seed(seed)
    model = task.build_model()
    task.prepare(model)
    with torch.no_grad():
        for weight in model.unet.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    return model


def loss_and_gradients(task, model, batch):
    model.zero_grad()
    loss = task.loss(model, batch, CPU)["loss"]
    loss.backward()
    return loss.detach(), {name: value.grad.clone() for name, value in model.unet.named_parameters()}


def test_tiny_differs_from_the_published_preset_in_sizes_and_counts_only():
    published = flatten(tvp.svd(initial="svd", data="d", output="o").to_json())
    small = flatten(tvp.tiny(vae="v", data="d", output="o").to_json())
    different = {key for key in published.keys() | small.keys() if published.get(key) != small.get(key)}
    assert "optim.lr" in different and "schedule.steps" in different
    unexpected = {key for key in different if not any(f"{key}.".startswith(f"{ok}.") for ok in tvp.SIZES_AND_COUNTS)}
    assert unexpected == set()


def test_the_published_preset_has_the_published_numbers():
    config = tvp.svd(initial="svd", data="d", output="o")
    model, optim, schedule = config.model, config.optim, config.schedule
    assert (model.num_frames, model.image_size, model.fps, model.motion_bucket) == (16, 256, 7, 127)
    assert model.unet.block_out_channels == (320, 640, 1280, 1280)
    assert (model.unet.num_attention_heads, model.unet.layers_per_block) == ((5, 10, 20, 20), 2)
    assert (model.unet.cross_attention_dim, model.unet.addition_time_embed_dim) == (1024, 256)
    assert (model.sigma_log_mean, model.sigma_log_std, model.text_dropout) == (0.7, 1.6, 0.05)
    assert (model.condition_noise_log_mean, model.condition_noise_log_std) == (-3.0, 0.5)
    assert (model.text.kind, model.text.max_tokens, model.text.truncate) == ("clip", 20, True)
    assert (model.vae.scaling_factor, model.decode_chunk, model.position_code) == (0.18215, 7, True)
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay, optim.clip_norm) == (5e-6, (0.9, 0.999), 1e-8, 0, 1)
    assert optim.ema_decay is None
    assert (schedule.shape, schedule.warmup_steps, schedule.steps) == ("constant", 0, 100_000)
    assert (config.global_batch_size, config.compute.workers * config.micro_batch_size) == (48, 48)
    assert config.precision == "bf16" and config.checkpoint_activations and config.condition_noise
    assert (config.previews.every_steps, config.previews.validation_clips) == (2000, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.image_size=32", "data.image_size 32 is not model.image_size 16"),
        ("model.num_frames=5", "clips of 4 frames for model.num_frames 5"),
        ("initial=somewhere", "brings its autoencoder"),
        ("log_every_steps=2", "previews.every_steps"),
        ("latents=mean", "latents"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(parts, tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        small_finetune(parts, tmp_path, change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.decode_chunk=7", "fitted on single frames"),
        ("model.unet.block_out_channels=[32, 32, 32, 32, 32]", "does not divide"),
        ("vae=/nowhere", "/nowhere"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused_before_anything_is_trained(parts, tmp_path, change, words):
    heads = "model.unet.num_attention_heads=[2, 2, 2, 2, 2]" if "block_out" in change else "seed=0"
    value = small_finetune(parts, tmp_path).to_json()
    for assignment in (change, heads):
        key, _, text = assignment.partition("=")
        node = value
        for name in key.split(".")[:-1]:
            node = node[name]
        node[key.split(".")[-1]] = json.loads(text) if text[0] in "[0123456789" else text
    with pytest.raises((ConfigError, InputError), match=words):
        parse_config(value).build_task()


def test_a_run_without_weights_can_be_planned_but_not_trained(parts, tmp_path):
    task = small_finetune(parts, tmp_path, "vae=").build_task()
    with torch.device("meta"):
        model = task.build_model()
    assert task.loss(model, task.example(2), torch.device("meta"))["loss"].shape == ()
    with pytest.raises(ConfigError, match="neither initial nor vae"):
        task.prepare(model)


def test_a_text_encoder_of_another_width_is_named(parts, tmp_path):
    task = small_finetune(parts, tmp_path, "model.unet.cross_attention_dim=64").build_task()
    with pytest.raises(ConfigError, match="384 numbers a token, twice that is not the UNet's 64"):
        task.loss(task.build_model(), one_batch(task), CPU)


def test_a_cache_of_another_autoencoder_or_text_length_is_refused(parts, tmp_path):
    other = {**parts, "vae": make_vae(tmp_path / "other", seed=1)}
    with pytest.raises(InputError, match="is of VAE"):
        small_finetune(other, tmp_path, cached=True).build_task()
    with pytest.raises(InputError, match="text tokens"):
        small_finetune(parts, tmp_path, "model.text.max_tokens=6", cached=True).build_task()
    mixed = (source_of_clips(parts, latents=parts["cache"]), source_of_clips(parts, name="again"))
    with pytest.raises(ConfigError, match="cache all or none"):
        small_finetune(parts, tmp_path, sources=mixed)


def test_the_cache_gives_the_loss_of_the_pixels(parts, tmp_path):
    pixels = small_finetune(parts, tmp_path, "condition_noise=false", "precision=float32").build_task()
    cached = small_finetune(parts, tmp_path, "latents=mode", "precision=float32", cached=True).build_task()
    model = model_of(pixels)
    seen, stored = one_batch(pixels), one_batch(cached)
    assert seen.visits == stored.visits and stored.pixels is None
    torch.testing.assert_close(
        pixels.loss(model, seen, CPU)["loss"], cached.loss(model, stored, CPU)["loss"], rtol=1e-5, atol=1e-6
    )


def test_a_cached_sample_is_mean_plus_deviation_times_the_visits_noise(parts, tmp_path):
    task = small_finetune(parts, tmp_path, "precision=float32", cached=True).build_task()
    model, batch = model_of(task), one_batch(task)
    draws, noise, _ = task.draws(batch, CPU)
    latents = (batch.moments[:, :, 0] + batch.moments[:, :, 1] * noise) * model.scale
    tokens = encode_text(batch.text_states, position_code=True)
    torch.testing.assert_close(task.loss(model, batch, CPU)["loss"], model.training_loss(latents, tokens, draws))
    mode = override(task.config, ["latents=mode"]).build_task()
    assert task.loss(model, batch, CPU)["loss"] != mode.loss(model, batch, CPU)["loss"]


def test_the_pixel_path_noises_the_condition_and_not_the_targets(parts, tmp_path):
    task = small_finetune(parts, tmp_path, "precision=float32").build_task()
    model, batch = model_of(task), one_batch(task)
    draws, _, (sigma, noise) = task.draws(batch, CPU)
    pixels = to_model_range(batch.pixels)
    with torch.no_grad():
        flat = model.vae.encode(pixels.flatten(0, 1)).latent_dist.mean
        strength = torch.exp(-3.0 + 0.5 * sigma.reshape(-1, 1, 1, 1))
        first = model.vae.encode(pixels[:, 0] + strength * noise).latent_dist.mean
    latents = flat.unflatten(0, pixels.shape[:2]) * model.scale
    kept = (draws.text_keep > 0.05).float().view(-1, 1, 1)
    tokens = encode_text(task._encoder.encode(batch.texts), position_code=True) * kept
    level = torch.exp(0.7 + 1.6 * draws.sigma_noise)
    noisy = latents + level * draws.latent_noise
    inputs = torch.cat([noisy / (level**2 + 1).sqrt(), first[:, None].expand_as(latents)], dim=2)
    ids = torch.stack([torch.full((4,), 7.0), torch.full((4,), 127.0), strength.reshape(-1)], dim=1)
    answer = model.unet(inputs, level.reshape(-1).log() / 4, tokens, ids).sample
    predicted = -level / (level**2 + 1).sqrt() * answer + noisy / (level**2 + 1)
    expected = ((level**2 + 1) / level**2 * (predicted - latents) ** 2).mean()
    torch.testing.assert_close(task.loss(model, batch, CPU)["loss"], expected, rtol=1e-4, atol=1e-5)


def test_activations_computed_twice_change_neither_loss_nor_gradients(parts, tmp_path):
    kept = small_finetune(parts, tmp_path, "precision=float32", cached=True).build_task()
    again = small_finetune(
        parts, tmp_path, "precision=float32", "checkpoint_activations=true", cached=True
    ).build_task()
    model, batch = model_of(kept).train(), one_batch(kept)
    frugal = again.build_model().train()
    assert frugal.unet.is_gradient_checkpointing and not model.unet.is_gradient_checkpointing
    frugal.load_state_dict(model.state_dict())
    expected, found = loss_and_gradients(kept, model, batch), loss_and_gradients(again, frugal, batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_to_the_batch_whatever_the_coefficients(parts, tmp_path):
    sources = (
        source_of_clips(parts, name="heavy", loss_coefficient=3.0, labels=()),
        source_of_clips(parts, name="light", loss_coefficient=0.5),
    )
    task = small_finetune(parts, tmp_path, "precision=float32", sources=sources).build_task()
    model, batch = model_of(task).train(), one_batch(task)
    assert len(set(batch.coefficients.tolist())) == 2
    plan = LoopPlan(Schedule(1e-3, 0, 0, 6, "constant", 1), 4, 0, "float32")

    def gradients(parts_of_batch):
        model.zero_grad()
        module = torch.nn.Module()
        module.forward = lambda part: task.loss(model, part, CPU)
        metrics = accumulate_gradients(module, parts_of_batch, plan, Group())
        return metrics["loss"], {name: value.grad.clone() for name, value in model.unet.named_parameters()}

    whole, cut = gradients([batch]), gradients([batch.part(0, 1), batch.part(1, 4)])
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-3, atol=1e-6)


def test_coefficients_weigh_the_losses_of_their_sources(parts, tmp_path):
    sources = (
        source_of_clips(parts, name="heavy", loss_coefficient=3.0),
        source_of_clips(parts, name="light", loss_coefficient=0.5),
    )
    weighted = small_finetune(parts, tmp_path, "precision=float32", sources=sources).build_task()
    model, batch = model_of(weighted), one_batch(weighted)
    plain = copy.copy(batch)
    object.__setattr__(plain, "coefficients", torch.ones(4))
    singles = [weighted.loss(model, plain.part(row, row + 1), CPU)["loss"].item() for row in range(4)]
    expected = sum(
        (3.0 if visit.source == 0 else 0.5) * loss for visit, loss in zip(batch.visits, singles, strict=True)
    )
    assert weighted.loss(model, batch, CPU)["loss"].item() == pytest.approx(expected / 4, rel=1e-5)


def test_a_clips_draws_do_not_depend_on_its_batch_and_differ_between_epochs(parts, tmp_path):
    task = small_finetune(parts, tmp_path).build_task()
    batch = one_batch(task)
    whole, single = task.draws(batch, CPU)[0], task.draws(batch.part(2, 3), CPU)[0]
    assert all(torch.equal(one[2:3], other) for one, other in zip(whole[:3], single[:3], strict=True))
    later = copy.copy(batch)
    object.__setattr__(later, "visits", tuple(visit._replace(epoch=visit.epoch + 1) for visit in batch.visits))
    assert not torch.equal(whole.latent_noise, task.draws(later, CPU)[0].latent_noise)


def test_a_run_leaves_an_export_its_losses_and_previews(parts, trained):
    config, summary = trained
    output = Path(config.output)
    model = load_video_model(output / "export")
    assert isinstance(model, VideoPredictor)
    assert (model.num_frames, model.image_size, model.digest) == (4, 16, summary["export"])
    weights = load_vae(parts["vae"]).vae.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.model.vae.state_dict().items())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rated = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert list(rated) == [1, 3, 6]
    assert summary["validation_loss"] == {"first": rated[1], "last": rated[6]}
    assert sorted(path.name for path in (output / "previews").iterdir()) == [
        f"step-00000{step}.{kind}" for step in (3, 6) for kind in ("mp4", "png")
    ]
    assert {read_record(parts["vae"])["digest"], *config.build_task()._dataset.inputs} <= set(
        read_record(output / "export")["inputs"]
    )


def test_the_recorded_validation_loss_is_that_of_the_exported_model(trained):
    config, summary = trained
    clips = spread_clips([source.model_copy(update={"split": "validation"}) for source in config.data.sources], 2)
    model = load_video_model(Path(config.output) / "export")
    losses = [
        model.validation_losses(clip.frames[None], [clip.text], keys=[clip.key], num_draws=2, seed=config.seed)[0]
        for clip in clips
    ]
    assert np.mean(losses) == pytest.approx(summary["validation_loss"]["last"], rel=1e-5)


def test_a_run_starts_from_an_earlier_export_and_its_average_too(trained, parts, tmp_path):
    start = str(Path(trained[0].output) / "export")
    config = small_finetune(parts, tmp_path, "vae=", f"initial={start}", "optim.ema_decay=0.9", "schedule.steps=1")
    config = override(config, ["optim.lr=1e-9", "previews.every_steps=0"])
    weights = load_video_weights(start).state_dict()
    task = config.build_task()
    saved = []
    train(config, task, Group(), lambda folder, name, metrics: saved.append(folder))
    from safetensors.torch import load_file

    for name in ("model", "average"):
        for key, value in load_file(saved[-1] / f"{name}.safetensors").items():
            torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-6)


def test_weights_of_another_model_are_refused(trained, parts, tmp_path):
    start = str(Path(trained[0].output) / "export")
    for change, words in (
        ("model.position_code=false", "position_code is False"),
        ("model.unet.layers_per_block=2", "unet.layers_per_block is 2"),
    ):
        task = small_finetune(parts, tmp_path, "vae=", f"initial={start}", change).build_task()
        with pytest.raises(ConfigError, match=words):
            task.prepare(task.build_model())


def test_a_data_set_without_held_out_clips_shows_training_clips_and_rates_none(parts, tmp_path):
    rule = source_of_clips(parts).rule
    sources = (ClipSource(name="a", url=parts["data"], split=None, rule=rule, labels=()),)
    task = small_finetune(parts, tmp_path, sources=sources).build_task()
    shown, rated = task.preview_clips()
    assert (len(shown), len(rated)) == (1, 2)
    only = make_parts_without_validation(parts, tmp_path)
    shown, rated = small_finetune(only, tmp_path).build_task().preview_clips()
    assert (len(shown), len(rated)) == (1, 0)


def make_parts_without_validation(parts, tmp_path):
    from tests.helpers_clips import Take, make_takes

    takes = [Take(num_frames=6, text="push it"), Take(num_frames=6, text="pull it")]
    return {**parts, "data": make_takes(tmp_path / "takes", takes)}


def test_previews_decode_to_the_asked_frames_and_sizes(trained, parts, tmp_path):
    predictor = load_video_model(Path(trained[0].output) / "export")
    clips = spread_clips([source_of_clips(parts)], 3)
    assert len({clip.key for clip in clips}) == 3
    video, sheet = write_previews(tmp_path, predictor, clips, name="look", num_steps=2)
    with av.open(video) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    # 16 pixels are enlarged 8 times; two caption lines above each clip; three columns with gaps of 2.
    assert len(frames) == 4 and frames[0].shape == (3 * (128 + 32), 3 * 128 + 2 * 2, 3)
    assert Image.open(sheet).size == (4 * 128 + 3 * 2, 3 * (16 + 3 * (16 + 128 + 2)))
    truth = np.stack([np.asarray(Image.fromarray(frame).resize((16, 16), 2)) for frame in clips[0].frames])
    shown = np.stack(frames)[:, 32:160, :128]
    assert np.abs(shown.astype(int) - truth.repeat(8, axis=1).repeat(8, axis=2)).mean() < 6
    again = write_previews(tmp_path / "again", predictor, clips, name="look", num_steps=2)
    first, second = (np.asarray(Image.open(picture), np.int64) for picture in (sheet, again[1]))
    assert np.abs(first - second).mean() < 0.1
    with pytest.raises(ConfigError, match="no clips"):
        write_previews(tmp_path, predictor, [])


def test_videos_of_odd_sides_get_even_canvases_and_unequal_ones_are_refused():
    ramp = np.arange(3 * 65 * 65 * 3, dtype=np.uint64).reshape(3, 65, 65, 3).astype(np.uint8)
    beside = side_by_side({"a": ramp, "b": ramp})
    assert beside.shape == (3, 98, 132, 3) and np.array_equal(beside[:, 32:97, 67:132], ramp)
    sheet = contact_sheet({"a": ramp, "b": ramp}, num_frames=2)
    assert np.array_equal(sheet[32:97, 67:132], ramp[2])
    with pytest.raises(ConfigError, match="different shapes"):
        side_by_side({"a": ramp, "b": ramp[:2]})


def test_every_kind_of_training_job_is_known(parts, tmp_path):
    jobs = [small_finetune(parts, tmp_path), config_of(parts["data"], parts["vae"], tmp_path)]
    for config in jobs:
        assert parse_config(json.loads(json.dumps(config.to_json()))) == config


def test_a_cache_is_filled_through_the_training_command(parts, tmp_path, capsys):
    from training.main import main

    config = config_of(parts["data"], parts["vae"], tmp_path / "cache")
    config.save(tmp_path / "job.json")
    assert main([str(tmp_path / "job.json"), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == cache_build.plan(config)
    assert main([str(tmp_path / "job.json")]) == 0
    assert (tmp_path / "cache" / "manifest.json").exists()


def test_a_new_run_of_equal_config_starts_with_equal_weights(parts, tmp_path):
    config = small_finetune(parts, tmp_path, cached=True)
    states = [new_state(config, config.build_task(), CPU).model.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
