"""Feature providers: what they take from a frozen model, what their shapes and digests say of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, InputError
from tests.helpers_models import export_rsp, perturbed
from tests.helpers_tvp import tiny_model
from training.export import load_encoder, load_vae, load_video_model, save_video_export
from training.models.tvp.predictor import to_model_range
from training.providers import build_provider, check_references, parse_provider, provider_digest, references, with_url


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("video")
    save_video_export(folder, tiny_model(), card="A test.", inputs=["data"])
    return str(folder)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 40, 40, 3), np.uint8)


def tap(video: str, **changes: object):
    return build_provider(parse_provider({"kind": "tvp", "url": video, "autocast": False} | changes))


def test_tokens_are_the_joined_activations_row_by_row_view_behind_view(video):
    views = {"left": pictures(2), "right": pictures(2, seed=1)}
    text = ["push", "pull"]
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 4, 4, 8, 8, generator=draw)
    found = tap(video, cameras=["left", "right"]).features(views, text, unit_noise=noise)
    frozen = load_video_model(video)
    expected = []
    for camera in ("left", "right"):
        grid_BTCHW = frozen.model.extract_features(
            to_model_range(views[camera], 32), frozen.tokens(text), unit_noise=noise
        )
        rows = [
            grid_BTCHW[..., row, column]
            for row in range(grid_BTCHW.shape[-2])
            for column in range(grid_BTCHW.shape[-1])
        ]
        expected.append(torch.stack(rows, dim=2))
    torch.testing.assert_close(found, torch.cat(expected, dim=2), atol=1e-5, rtol=1e-5)


def test_pooling_averages_squares_and_frames_are_spread_evenly(video):
    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = tap(video).features({"main": pictures(1)}, ["push"], unit_noise=noise)
    small = tap(video, pool=2, frames=3).features({"main": pictures(1)}, ["push"], unit_noise=noise)
    side = int(whole.shape[2] ** 0.5)
    grid = whole[0].unflatten(1, (side, side))[[0, 1, 3]]  # int(k * 3 / 2)
    plain = torch.stack(
        [grid[:, y : y + 2, x : x + 2].mean(dim=(1, 2)) for y in range(0, side, 2) for x in range(0, side, 2)], dim=1
    )
    torch.testing.assert_close(small[0], plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [
    {}, {"pool": 2, "frames": 2}, {"layers": [0]}, {"layers": [1]}, {"layers": [2]}, {"aggregate": False},
    {"layers": [0, 1, 2]}, {"step": 2, "num_steps": 3}, {"sigma": 80.0}, {"interpolation": "bilinear"},
    {"cameras": ["main", "side"]}, {"random_seed": 1},
])  # fmt: skip
def test_the_shape_is_known_without_a_pass_and_every_setting_that_counts_is_in_the_digest(video, changes):
    plain, provider = tap(video), tap(video, **changes)
    images = {"main": pictures(2), "side": pictures(2, seed=1)}
    found = provider.features(images, ["push", "pull"])
    assert tuple(found.shape[1:]) == provider.feature_shape
    assert found.dtype == torch.float32
    wanted = parse_provider({"kind": "tvp", "url": video, "autocast": False} | changes)
    assert provider_digest(wanted) == provider.digest
    assert (provider.digest == plain.digest) == (changes == {})


def test_the_released_step_count_changes_nothing_the_noise_level_does(video):
    images = {"main": pictures(1)}
    plain = tap(video).features(images, ["push"])
    torch.testing.assert_close(tap(video, num_steps=10).features(images, ["push"]), plain)
    assert not torch.allclose(tap(video, sigma=10.0).features(images, ["push"]), plain, atol=1e-3)


def test_fresh_noise_follows_from_the_picture_fixed_noise_from_the_seed_alone(video):
    images = pictures(3)
    fresh, fixed = tap(video, noise="fresh"), tap(video)
    text = ["push"] * 3
    together = fresh.features({"main": images}, text)
    alone = fresh.features({"main": images[2:]}, ["push"])
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=1e-4)
    same = np.stack([images[0], images[0]])
    for provider in (fresh, fixed):
        first, second = provider.features({"main": same}, ["push"] * 2)
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(fresh.features({"main": images}, text), fixed.features({"main": images}, text), atol=1e-2)
    # Further draws are as the first might have been: of each picture, or one for all.
    for provider in (fresh, fixed):
        again = provider.features({"main": images}, text, draw=1)
        assert not torch.allclose(again, provider.features({"main": images}, text), atol=1e-2)
        same_twice = provider.features({"main": images[[0, 0]]}, text[:1] * 2, draw=1)
        torch.testing.assert_close(same_twice[0], same_twice[1], atol=1e-4, rtol=1e-4)
    again = fresh.features({"main": images[2:]}, ["push"], draw=1)
    torch.testing.assert_close(fresh.features({"main": images}, text, draw=1)[2:], again, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(tap(video, noise_seed=1).features({"main": images}, text), together, atol=1e-2)


def test_an_untrained_video_model_keeps_the_autoencoder_and_repeats(video):
    images = {"main": pictures(1)}
    one, again, other = (tap(video, random_seed=seed).features(images, ["push"]) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.allclose(one, other, atol=1e-2)
    assert not torch.allclose(one, tap(video).features(images, ["push"]), atol=1e-2)


def test_the_autoencoder_alone_gives_scaled_latents(video):
    provider = build_provider(parse_provider({"kind": "vae", "url": video}))
    images = pictures(2)
    vae = load_vae(video)
    mean, _ = vae.encode(to_model_range(images, 32))
    expected = torch.stack([mean[:, :, y, x] for y in range(8) for x in range(8)], dim=1) * vae.scale
    found = provider.features({"main": images}, ["", ""])
    assert provider.feature_shape == (1, 64, 4)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_an_encoders_tokens_are_one_frame(tmp_path):
    export_rsp(tmp_path, perturbed())
    images = pictures(2)
    provider = build_provider(parse_provider({"kind": "encoder", "url": str(tmp_path)}))
    encoder = load_encoder(tmp_path)
    tokens = encoder.encode(encoder.preprocess(images))
    torch.testing.assert_close(provider.features({"main": images}, ["", ""])[:, 0], tokens[:, 1:])
    assert provider.feature_shape == (1, 16, 48)
    still = build_provider(parse_provider({"kind": "encoder", "url": str(tmp_path), "feature": "class_token"}))
    torch.testing.assert_close(still.features({"main": images}, ["", ""])[:, 0, 0], tokens[:, 0])


def test_weights_that_moved_are_found_and_others_refused(video, tmp_path):
    config = parse_provider({"kind": "tvp", "url": video})
    wanted = references(config)
    save_video_export(tmp_path / "copy", tiny_model(), card="A test.", inputs=["data"])
    check_references(with_url(config, str(tmp_path / "copy")), wanted)
    save_video_export(tmp_path / "other", tiny_model(seed=1), card="A test.", inputs=["data"])
    with pytest.raises(InputError, match=r"other holds .* the policy was trained on"):
        check_references(with_url(config, str(tmp_path / "other")), wanted)


@pytest.mark.parametrize(("changes", "words"), [
    ({"pool": 3}, "pool = 3 does not divide"),
    ({"frames": 9}, "the video model predicts 4"),
    ({"layers": [0, 7]}, "up-blocks 0 to 2"),
])  # fmt: skip
def test_settings_the_model_does_not_have_are_refused(video, changes, words):
    with pytest.raises(ConfigError, match=words):
        tap(video, **changes)


@pytest.mark.parametrize(("value", "words"), [
    ({"kind": "tvq"}, "unknown kind of features 'tvq'"),
    ({"kind": "tvp", "url": "u", "layer": [1]}, "Did you mean 'layers'"),
    ({"kind": "tvp", "url": "u", "step": 30}, "step 30 of 20"),
    ({"kind": "timm", "model": "vit_tiny_patch16_224"}, "weights"),
])  # fmt: skip
def test_wrong_configs_are_one_line(value, words):
    with pytest.raises(ConfigError, match=words) as error:
        parse_provider(value)
    assert "\n" not in str(error.value)


def test_a_camera_that_is_missing_is_named(video):
    with pytest.raises(InputError, match="camera side"):
        tap(video, cameras=["main", "side"]).features({"main": pictures(1)}, ["push"])


def test_features_are_joined_by_nearest_neighbours(video):
    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    coarse, fine = (
        tap(video, layers=[layer], aggregate=False).features({"main": pictures(1)}, ["push"], unit_noise=noise)
        for layer in (0, 1)
    )
    both = tap(video).features({"main": pictures(1)}, ["push"], unit_noise=noise)
    side = int(coarse.shape[2] ** 0.5)
    times = int(fine.shape[2] ** 0.5) // side
    grid = coarse[0].unflatten(1, (side, side)).repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
    torch.testing.assert_close(both[0], torch.cat([grid.flatten(1, 2), fine[0]], dim=-1), atol=1e-5, rtol=1e-5)
