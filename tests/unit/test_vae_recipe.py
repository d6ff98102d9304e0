"""Fitting a video autoencoder on single frames, and what is said of how well it rebuilds them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from infra.errors import ConfigError
from ingest.reader import ShardDataset
from tests.helpers_cache import make_two_cameras, make_vae
from tests.helpers_clips import Take, make_takes
from tests.helpers_finetune import small_fit, source_of_clips
from training.export_files import read_record
from training.export_video import load_vae
from training.launch import launch
from training.loop import Group
from training.main import parse_config
from training.plan import dry_run
from training.recipes import vae
from training.recipes.vae_quality import MeasuredFrames, latent_deviation, measure, psnr_db, quality, spread_frames


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return {"data": make_two_cameras(tmp_path_factory.mktemp("data"))}


def one_batch(task, step=0):
    options = {"global_batch_size": 4, "micro_batch_size": 4, "group": Group(), "loader_workers": 0}
    return next(iter(task.batches(steps=range(step, step + 1), **options)))[0]


def test_the_export_is_scaled_by_the_deviation_of_its_own_latents_and_reports_its_pictures(parts, tmp_path):
    config = small_fit(parts, tmp_path, "schedule.steps=25", "schedule.warmup_steps=2", "optim.lr=3e-3")
    summary = launch(config)
    assert summary["last"]["mse"] < 0.7 * summary["first"]["mse"]
    export = load_vae(tmp_path / "export")
    assert export.image_size == 16 and read_record(tmp_path / "export")["inputs"] == [
        ShardDataset(parts["data"]).version
    ]

    frames = spread_frames(config.data.sources, 12, size=16)
    with torch.no_grad():
        posterior = export.vae.encode(frames.pixels / 127.5 - 1).latent_dist
    mean, std = posterior.mean.double().numpy(), posterior.std.double().numpy()
    second_moment = (mean**2 + std**2).mean()
    assert export.scale == pytest.approx(1 / math.sqrt(second_moment - mean.mean() ** 2), rel=1e-5)

    report = summary["reconstruction"]
    assert report == json.loads((tmp_path / "export" / "reconstruction.json").read_text())
    assert report["split"] == "validation" and report["frames"] == 12
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"{report['psnr_db']} dB" in card and f"{report['moving_floor_db']} dB" in card
    assert Image.open(tmp_path / "export" / "reconstruction.png").size[0] > 8 * 128


def test_psnr_is_that_of_the_mean_squared_error_in_levels():
    truth = torch.full((2, 3, 4, 4), 100.0)
    guess = truth.clone()
    guess[0] += 10.0  # half of the values are off by 10: mean squared error 50
    assert psnr_db(truth, guess) == pytest.approx(10 * math.log10(255**2 / 50), abs=1e-3)
    assert psnr_db(truth, truth) == 99.0
    assert psnr_db(truth[:0], guess[:0]) is None


def test_the_report_of_a_known_reconstruction():
    """Label a: a square of 50 more in one of two frames. Label b: still. The reconstruction is 5 off everywhere."""
    pixels = torch.full((4, 3, 4, 4), 80.0)
    pixels[0, :, :2, :2] += 100.0
    frames = MeasuredFrames(pixels, ("a", "a", "b", "b"), "validation")
    floor = torch.full((4, 3, 4, 4), 80.0)
    floor[:2, :, :2, :2] += 50.0  # the mean of the two frames of label a
    report = quality(frames, pixels + 5.0, floor)

    def db(mse):
        return pytest.approx(10 * math.log10(255**2 / mse), abs=1e-3)

    assert report["psnr_db"] == report["moving_db"] == report["labels"]["b"]["psnr_db"] == db(25)
    # A quarter of the pixels of label a is 50 off the mean picture, an eighth of all.
    assert report["floor_db"] == db(2500 / 8) and report["labels"]["a"]["floor_db"] == db(2500 / 4)
    assert report["moving_floor_db"] == db(2500)
    assert report["moving_share"] == 0.125
    still = report["labels"]["b"]
    assert (still["floor_db"], still["moving_db"], still["moving_share"]) == (99.0, None, 0.0)


def test_mean_pictures_come_from_training_frames_and_unknown_labels_get_that_of_all(tmp_path):
    model = load_vae(make_vae(tmp_path / "vae")).vae
    black, white = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 200.0)
    training = MeasuredFrames(torch.cat([black, white]), ("a", "b"), "train")
    unseen = MeasuredFrames(torch.cat([white, white]), ("b", "new"), "validation")
    report, _ = measure(model, training, unseen)
    assert report["labels"]["b"]["floor_db"] == 99.0
    assert report["labels"]["new"]["floor_db"] == pytest.approx(10 * math.log10(255**2 / 100**2), abs=1e-3)


def test_every_frame_of_an_episode_can_be_drawn_and_the_same_visit_draws_the_same(tmp_path):
    data = make_takes(tmp_path / "takes", [Take(num_frames=12)])
    config = small_fit({"data": data}, tmp_path, "global_batch_size=4")
    task = config.build_task()
    levels = set()
    for step in range(40):
        batch = one_batch(task, step)
        levels |= {round(float(pixels.float().mean() - 4) / 2) for pixels in batch.pixels}
    assert levels == set(range(12))  # the picture of frame f has the level 2 f + 4
    again = small_fit({"data": data}, tmp_path).build_task()
    assert torch.equal(one_batch(task, 7).pixels, one_batch(again, 7).pixels)


def test_measured_frames_cover_episodes_and_labels(tmp_path):
    takes = [Take(num_frames=10, label=label) for label in ("a", "a", "b")]
    source = source_of_clips({"data": make_takes(tmp_path / "takes", takes)})
    frames = spread_frames([source], 30, size=16)
    levels = {round(float(pixels.mean() - 4) / 2) for pixels in frames.pixels}
    assert levels == set(range(10))
    assert {label: frames.labels.count(label) for label in "ab"} == {"a": 20, "b": 10}
    assert frames.pixels.shape == (30, 3, 16, 16) and frames.split == "train"


def test_the_loss_is_its_stated_sum(parts, tmp_path):
    task = small_fit(parts, tmp_path).build_task()
    torch.manual_seed(0)
    model = task.build_model()
    batch = one_batch(task)
    losses = task.loss(model, batch, torch.device("cpu"))
    pixels = batch.pixels / 127.5 - 1
    posterior = model.encode(pixels).latent_dist
    noise = task._noise(batch, posterior.mean)
    decoded = torch.cat(
        [model.decode(latent[None], num_frames=1).sample for latent in posterior.mean + posterior.std * noise]
    )  # one at a time
    expected = F.mse_loss(decoded, pixels) + 0.1 * F.l1_loss(decoded, pixels) + 1e-6 * posterior.kl().mean()
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-6)
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert not torch.equal(noise[0], noise[1])


def test_the_deviation_counts_what_the_posterior_leaves_open(tmp_path):
    model = load_vae(make_vae(tmp_path / "vae")).vae
    frames = MeasuredFrames(torch.full((2, 3, 16, 16), 90.0), ("", ""), "train")
    with torch.no_grad():
        posterior = model.encode(torch.full((1, 3, 16, 16), 90.0) / 127.5 - 1).latent_dist
    drawn = torch.stack([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(400)])
    assert latent_deviation(model, frames) == pytest.approx(float(drawn.std()), rel=0.02)


def test_configs_that_do_not_fit_are_refused(parts, tmp_path):
    value = small_fit(parts, tmp_path).to_json()
    assert parse_config(json.loads(json.dumps(value))).kind == "fit-vae"
    with pytest.raises(ConfigError, match="does not divide"):
        parse_config(value | {"data": value["data"] | {"image_size": 17}})
    cached = [value["data"]["sources"][0] | {"latents": "cache"}]
    with pytest.raises(ConfigError, match="fitted on pixels"):
        parse_config(value | {"data": value["data"] | {"sources": cached}})


def test_the_preset_is_of_the_measured_sizes(parts, tmp_path):
    config = vae.tiny(data=(source_of_clips(parts),), output=str(tmp_path))
    assert (config.schedule.steps, config.global_batch_size, config.optim.lr) == (224, 16, 1e-3)
    plan = dry_run(config)
    assert plan["parameters"] == pytest.approx(1.10e6, rel=0.01)
    assert not (Path(tmp_path) / "config.json").exists()
    frames = np.linspace(0, 255, 64 * 64 * 3, dtype=np.uint8).reshape(1, 3, 64, 64)
    model = config.build_task().build_model()
    with torch.no_grad():
        assert model.encode(torch.from_numpy(frames) / 127.5 - 1).latent_dist.mean.shape == (1, 4, 8, 8)
