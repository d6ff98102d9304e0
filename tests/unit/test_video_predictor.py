"""Exports of video models and autoencoders, the folder layout of diffusers, and the frozen predictor's promises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import InputError
from tests.helpers_tvp import TINY, randoms, tiny_model
from training.export import (
    load_encoder,
    load_vae,
    load_video_model,
    load_video_weights,
    read_record,
    save_vae_export,
    save_video_export,
    video_digest,
)
from training.models.tvp.autoencoder import autoencoder_digest
from training.models.tvp.official import load_diffusers, save_diffusers
from training.models.tvp.predictor import FrozenVideoModel, to_model_range, to_uint8
from training.protocols import VideoPredictor

TEXTS = ("push the block", "open the drawer", "push the block")


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tvp")
    save_video_export(folder, tiny_model(), card="# card", inputs=["data"])
    return folder


@pytest.fixture(scope="module")
def predictor(export: Path) -> FrozenVideoModel:
    return load_video_model(export)


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_an_export_gives_the_same_model_back(export: Path) -> None:
    model, expected = load_video_weights(export), tiny_model()
    assert model.config == TINY
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert read_record(export)["kind"] == "tvp"
    assert read_record(export)["inputs"] == ["data"]
    assert json.loads((export / "preprocessing.json").read_text())["image_size"] == 32
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all(name.startswith("unet.") for name in trained)


def test_weights_of_an_average_replace_the_models_own(tmp_path: Path) -> None:
    other = tiny_model(seed=1).state_dict()
    save_video_export(tmp_path, tiny_model(), card="", inputs=[], weights=other)
    assert torch.equal(load_video_weights(tmp_path).state_dict()["unet.conv_in.bias"], other["unet.conv_in.bias"])


def test_our_folder_loads_in_diffusers_and_comes_back(tmp_path: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline

    config = TINY.model_copy(update={"position_code": False, "decode_chunk": 1})
    model = tiny_model(config)
    save_diffusers(tmp_path, model)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tmp_path, image_encoder=None, feature_extractor=None)
    for part in ("unet", "vae"):
        theirs = getattr(pipeline, part).state_dict()
        assert all(torch.equal(theirs[name], value) for name, value in getattr(model, part).state_dict().items())
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    assert pipeline.vae.config.scaling_factor == 0.4
    again = load_diffusers(tmp_path)
    assert again.config == config
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_unused_parts_of_a_release_are_copied_along(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save_diffusers(first, tiny_model())
    (first / "image_encoder").mkdir()
    (first / "image_encoder" / "config.json").write_text("{}")
    index = json.loads((first / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (first / "model_index.json").write_text(json.dumps(index))
    save_diffusers(second, tiny_model(), parts_from=first)
    assert (second / "image_encoder" / "config.json").read_text() == "{}"
    written = json.loads((second / "model_index.json").read_text())
    assert written["image_encoder"] == index["image_encoder"]
    assert written["feature_extractor"] == [None, None]


def test_a_folder_predicts_as_the_export_does(export: Path, predictor: FrozenVideoModel, tmp_path: Path) -> None:
    save_diffusers(tmp_path, load_video_weights(export))
    folder = load_video_model(tmp_path)
    images = pictures(1, 40, 40)
    assert np.array_equal(
        folder.predict(images, TEXTS[:1], num_steps=1), predictor.predict(images, TEXTS[:1], num_steps=1)
    )
    assert folder.digest == video_digest(tmp_path) != predictor.digest == video_digest(export)
    before = folder.digest
    (tmp_path / "foreframe.json").write_text('{"position_code": false}')
    assert video_digest(tmp_path) != before


def test_autoencoders_load_from_every_place_and_keep_their_name(export: Path, tmp_path: Path) -> None:
    model = tiny_model()
    save_vae_export(tmp_path / "vae", model.vae, TINY.vae, image_size=32, card="", inputs=["data"])
    save_diffusers(tmp_path / "folder", model)
    loaded = [load_vae(url) for url in (tmp_path / "vae", export, tmp_path / "folder")]
    assert {vae.digest for vae in loaded} == {autoencoder_digest(model.vae)}
    assert {vae.scale for vae in loaded} == {0.4}
    pixels = randoms(0)(3, 3, 32, 32).clamp(-1, 1)
    expected = model.encode(pixels[None])
    for vae in loaded:
        mean, std = vae.encode(pixels, chunk=2)
        assert torch.allclose(mean, expected[0][0], atol=1e-5)
        assert torch.allclose(std, expected[1][0], atol=1e-5)
        assert torch.allclose(vae.decode(mean[None], chunk=3), model.decode(mean[None] * 0.4, chunk=3), atol=1e-5)


def test_an_autoencoders_name_follows_its_encoder_only() -> None:
    model = tiny_model()
    name = autoencoder_digest(model.vae)
    with torch.no_grad():
        model.vae.decoder.conv_in.bias += 1
    assert autoencoder_digest(model.vae) == name
    with torch.no_grad():
        model.vae.encoder.conv_in.bias += 1
    assert autoencoder_digest(model.vae) != name


def test_exports_of_another_kind_are_refused(export: Path, tmp_path: Path) -> None:
    save_vae_export(tmp_path, tiny_model().vae, TINY.vae, image_size=32, card="", inputs=[])
    with pytest.raises(InputError, match="'video-vae' export"):
        load_video_model(tmp_path)
    with pytest.raises(InputError, match="'tvp' export"):
        load_encoder(export)
    with pytest.raises(InputError, match=r"export\.json is missing"):
        load_video_model(tmp_path / "nothing")


def test_it_is_a_predictor(predictor: FrozenVideoModel) -> None:
    assert isinstance(predictor, VideoPredictor)
    clips = predictor.predict(pictures(2, 40, 50), TEXTS[:2], num_steps=2)
    assert clips.shape == (2, 4, 32, 32, 3)
    assert clips.dtype == np.uint8
    assert predictor.reconstruct(pictures(2, 4, 40, 50)).shape == (2, 4, 32, 32, 3)
    assert predictor.predict(pictures(0, 32, 32), []).shape == (0, 4, 32, 32, 3)


def test_predictions_do_not_depend_on_the_batch(export: Path, predictor: FrozenVideoModel) -> None:
    images = pictures(3, 32, 32)
    together = predictor.predict(images, TEXTS, num_steps=2)
    small = FrozenVideoModel(predictor.model, digest="", clips_at_once=1)
    alone = small.predict(images[::-1], TEXTS[::-1], num_steps=2)[::-1]
    assert np.abs(together.astype(int) - alone.astype(int)).max() <= 1


def test_predictions_follow_seed_picture_and_text(predictor: FrozenVideoModel) -> None:
    images = np.repeat(pictures(1, 32, 32), 2, axis=0)
    clips = predictor.predict(images, TEXTS[:1] * 2, num_steps=1)
    assert np.array_equal(clips[0], clips[1])  # equal pictures and texts
    other_text = predictor.predict(images, TEXTS[:2], num_steps=1)
    assert not np.array_equal(other_text[0], other_text[1])
    other_seed = predictor.predict(images[:1], TEXTS[:1], num_steps=1, seed=1)
    assert not np.array_equal(other_seed, clips[:1])


def test_given_noise_is_used(predictor: FrozenVideoModel) -> None:
    images, noise = pictures(2, 32, 32), randoms(3)(2, 4, 4, 8, 8)
    clips = predictor.predict(images, TEXTS[:2], num_steps=2, guidance=(1.0, 2.0), unit_noise=noise)
    pixels = to_model_range(images, 32)
    latents = predictor.model.sample(
        pixels, predictor.tokens(TEXTS[:2]), num_steps=2, guidance=(1.0, 2.0), unit_noise=noise
    )
    expected = to_uint8(predictor.model.decode(latents))
    assert np.abs(clips.astype(int) - expected.astype(int)).max() <= 1
    shared = predictor.predict(images, TEXTS[:2], num_steps=1, unit_noise=noise[:1])
    alone = predictor.predict(images[:1], TEXTS[:1], num_steps=1, unit_noise=noise[:1])
    assert np.abs(shared[:1].astype(int) - alone.astype(int)).max() <= 1


def test_validation_losses_belong_to_the_clips_key(predictor: FrozenVideoModel) -> None:
    videos = pictures(3, 4, 32, 32)
    keys = ("a/00000", "b/00000", "c/00001")
    together = predictor.validation_losses(videos, TEXTS, keys=keys, num_draws=3)
    assert together.shape == (3,)
    assert together.dtype == np.float32
    small = FrozenVideoModel(predictor.model, digest="", clips_at_once=2)
    turned = small.validation_losses(videos[::-1], TEXTS[::-1], keys=keys[::-1], num_draws=3)[::-1]
    assert together == pytest.approx(turned, rel=1e-4)
    renamed = predictor.validation_losses(videos[:1], TEXTS[:1], keys=["d/00000"], num_draws=3)
    assert renamed[0] != pytest.approx(together[0], rel=1e-3)
    reseeded = predictor.validation_losses(videos[:1], TEXTS[:1], keys=keys[:1], num_draws=3, seed=1)
    assert reseeded[0] != pytest.approx(together[0], rel=1e-3)


def test_more_draws_keep_the_first_ones(predictor: FrozenVideoModel) -> None:
    videos = pictures(1, 4, 32, 32)
    mean = [predictor.validation_losses(videos, TEXTS[:1], keys=["k"], num_draws=n)[0] for n in (1, 2)]
    again = predictor.validation_losses(videos, TEXTS[:1], keys=["k"], num_draws=1)[0]
    assert mean[0] == again
    assert mean[1] != mean[0]


def test_validation_loss_is_the_latent_paths_loss_of_the_drawn_numbers(
    predictor: FrozenVideoModel, monkeypatch
) -> None:
    calls = []
    plain = predictor.model.per_clip_loss

    def listen(latents, tokens, **options):
        calls.append((latents, tokens, options))
        return plain(latents, tokens, **options)

    monkeypatch.setattr(predictor.model, "per_clip_loss", listen)
    videos = pictures(1, 4, 32, 32)
    loss = predictor.validation_losses(videos, TEXTS[:1], keys=["k"], num_draws=2)
    assert len(calls) == 2
    assert all(options.get("condition") is None for *_, options in calls)
    assert torch.allclose(calls[0][0], predictor.model.encode(to_model_range(videos[0], 32)[None])[0] * 0.4)
    sigmas = [options["sigma"].item() for *_, options in calls]
    assert sigmas[0] != sigmas[1]
    assert all(0.7 - 6 * 1.6 < np.log(sigma) < 0.7 + 6 * 1.6 for sigma in sigmas)
    with torch.no_grad():
        assert loss[0] == pytest.approx(np.mean([plain(*call[:2], **call[2]).item() for call in calls]), rel=1e-5)


def test_copying_the_first_frame_is_rated_at_the_same_draws(predictor: FrozenVideoModel) -> None:
    still = np.repeat(pictures(1, 1, 32, 32), 4, axis=1)
    moving = pictures(1, 4, 32, 32)
    rate = [
        predictor.validation_losses(clip, TEXTS[:1], keys=["k"], num_draws=2, copy_first_frame=True)[0]
        for clip in (still, moving)
    ]
    assert rate[0] == pytest.approx(0, abs=1e-6)
    latents = predictor.model.encode(to_model_range(moving[0], 32)[None])[0] * 0.4
    error = (latents - latents[:, :1]).square().mean().item()
    assert rate[1] > error  # the weight is above 1 at every noise level


@pytest.mark.parametrize("call", [
    lambda p: p.predict(pictures(1, 32, 32).astype(np.float32), TEXTS[:1]),
    lambda p: p.predict(pictures(2, 32, 32), TEXTS[:1]),
    lambda p: p.reconstruct(pictures(1, 32, 32)),
    lambda p: p.validation_losses(pictures(1, 4, 32, 32), TEXTS[:1], keys=[]),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(predictor: FrozenVideoModel, call) -> None:
    with pytest.raises(InputError) as caught:
        call(predictor)
    assert "\n" not in str(caught.value)


def test_pictures_are_resized_without_antialiasing_and_rounded_on_the_way_back() -> None:
    board = np.zeros((1, 4, 4, 3), np.uint8)
    board[:, ::2, ::2] = 255
    pixels = to_model_range(board, 2)
    assert torch.allclose(pixels, torch.full((1, 3, 2, 2), -0.5))  # each the mean of the four nearest
    assert to_model_range(np.array([[[[0, 128, 255]]]], np.uint8), 1).flatten().tolist() == pytest.approx(
        [-1, 128 / 127.5 - 1, 1], abs=1e-6
    )
    levels = torch.tensor([-1.0, 1.0, 0.0039, 3.0, 0.0]).view(1, 1, 1, 1, 5).expand(1, 1, 3, 1, 5)
    assert to_uint8(levels)[0, 0, 0, :, 0].tolist() == [0, 255, 128, 255, 128]


def test_bfloat16_is_close(predictor: FrozenVideoModel) -> None:
    fast = FrozenVideoModel(predictor.model, digest="", autocast=True)
    videos = pictures(1, 4, 32, 32)
    exact = predictor.validation_losses(videos, TEXTS[:1], keys=["k"], num_draws=2)
    rough = fast.validation_losses(videos, TEXTS[:1], keys=["k"], num_draws=2)
    assert rough == pytest.approx(exact, rel=0.05)
    assert not np.array_equal(rough, exact)
