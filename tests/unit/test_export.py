"""Exports come back bit for bit, stand alone, and refuse to be mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from infra.digests import sha256_file
from infra.errors import InputError
from tests.helpers_models import CONFIG, export_rsp, perturbed
from training.export import load_encoder, load_policy, load_rsp, random_encoder, raw_patches, save_export
from training.models.common.images import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from training.models.policies import BehaviourCloningConfig, BehaviourCloningHead, BehaviourCloningPolicy, Moments
from training.models.rsp import RSPDraws
from training.protocols import Encoder, Observation, Policy

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export")
    export_rsp(path, perturbed())
    return path


def test_round_trip_is_bit_exact(folder: Path) -> None:
    model, loaded, encoder = perturbed(), load_rsp(folder), load_encoder(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    images = encoder.preprocess(PICTURES)
    assert isinstance(encoder, Encoder)
    assert torch.equal(encoder.encode(images), model.encode(images))
    draws = RSPDraws(torch.randn(3, 3, 32, 32), torch.ones(3, 4, 4), torch.ones(3, 4, 4), torch.rand(3, 16))
    assert loaded(images, images, draws) == model(images, images, draws)


def test_record_names_the_weights_and_the_inputs(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "export.json").read_text())
    assert record["digest"] == record["id"] == sha256_file(folder / "model.safetensors") == load_encoder(folder).digest
    assert record["inputs"] == ["data-digest"]
    assert (folder / "README.md").read_text().startswith("# Tiny")
    assert export_rsp(tmp_path, perturbed()) == record["digest"]
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_encoder_weights_load_into_timm_and_agree(folder: Path) -> None:
    encoder = load_encoder(folder)
    other = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=0, global_pool=""
    ).eval()  # fmt: skip
    other.load_state_dict(encoder.model.state_dict(), strict=True)
    images = encoder.preprocess(PICTURES)
    with torch.no_grad():
        assert torch.allclose(encoder.encode(images), other(images), atol=2e-5)


def test_preprocessing_resizes_and_normalises_colours(folder: Path) -> None:
    encoder = load_encoder(folder)
    grey = np.full((1, 90, 70, 3), 128, np.uint8)
    expected = (128 / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert np.allclose(encoder.preprocess(grey).numpy(), expected[None, :, None, None], atol=1e-5)
    assert encoder.preprocess(PICTURES, (24, 48)).shape == (3, 3, 24, 48)


def test_bfloat16_encoding_stays_close(folder: Path) -> None:
    exact, fast = load_encoder(folder), load_encoder(folder, autocast=True)
    images = exact.preprocess(PICTURES)
    difference = fast.encode(images) - exact.encode(images)
    assert fast.encode(images).dtype == torch.float32
    assert 0 < difference.norm() < 0.05 * exact.encode(images).norm()


def test_random_encoder_depends_on_its_seed_alone(folder: Path) -> None:
    state = torch.random.get_rng_state()
    first, same, other = (random_encoder(folder, seed=seed) for seed in (0, 0, 1))
    images = first.preprocess(PICTURES)
    assert torch.equal(first.encode(images), same.encode(images))
    assert first.digest == same.digest == random_encoder(CONFIG, seed=0).digest
    assert not torch.equal(first.encode(images), other.encode(images)) and first.digest != other.digest
    assert torch.equal(state, torch.random.get_rng_state())


def test_raw_patches_are_the_colours() -> None:
    encoder = raw_patches(8, image_size=32)
    images = encoder.preprocess(PICTURES)
    tokens = encoder.encode(images)
    assert isinstance(encoder, Encoder) and tokens.shape == (3, 17, 192)
    assert torch.equal(tokens[0, 1 + 4 + 2], images[0, :, 8:16, 16:24].permute(1, 2, 0).flatten())


def make_policy(**changes) -> BehaviourCloningPolicy:
    torch.manual_seed(2)
    config = BehaviourCloningConfig(**({"feature_dim": 48, "text_dim": 0, "batch_norm": True} | changes))
    head = BehaviourCloningHead(config)
    head.set_statistics(
        features=Moments.of(torch.randn(50, 48) * 3 + 1), proprioception=Moments.of(torch.randn(50, 4) - 2),
        actions=Moments.of(torch.randn(50, 4) * 0.1),
    )  # fmt: skip
    encoder = random_encoder(CONFIG, seed=5) if config.uses_images else None
    return BehaviourCloningPolicy(head, encoder=encoder, camera="corner4")


def save_policy(folder: str | Path, policy: BehaviourCloningPolicy) -> str:
    return save_export(
        folder, kind="bc-policy", model_config=policy.config, weights=policy.weights(),
        preprocessing=policy.preprocessing, card="# Policy\n", inputs=["data"],
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"feature": "none", "feature_dim": 0}], ids=["vision", "blind"])
def test_policy_export_stands_alone(tmp_path: Path, changes: dict) -> None:
    policy = make_policy(**changes)
    digest = save_policy(tmp_path, policy)
    loaded = load_policy(tmp_path)
    images = {"corner4": PICTURES} if policy.needs_images else {}
    seen = Observation(images, np.ones((3, 4), np.float32), ("",) * 3)
    assert isinstance(loaded, Policy) and loaded.digest == digest and loaded.needs_images == policy.needs_images
    assert np.array_equal(loaded.act(seen), policy.act(seen))
    assert loaded.act(seen).shape == (3, 4, 4) and loaded.act(seen).dtype == np.float32


def test_missing_or_mixed_up_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"export\.json is missing"):
        load_encoder(tmp_path / "nowhere")
    export_rsp(tmp_path, perturbed())
    with pytest.raises(InputError, match="not a policy"):
        load_policy(tmp_path)

    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_heads": 4', '"num_heads": 3'))
    with pytest.raises(InputError, match=r"config\.json .* was changed"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(config)

    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors does not exist"):
        load_encoder(tmp_path)
    (tmp_path / "export.json").unlink()
    with pytest.raises(InputError, match=r"export\.json is missing"):
        load_encoder(tmp_path)
    with pytest.raises(InputError, match="unknown export kind 'rps'"):
        save_export(
            tmp_path, kind="rps", model_config={}, weights={}, preprocessing=Preprocessing(), card="", inputs=[]
        )


@pytest.mark.s3
def test_export_round_trip_through_s3(moto_s3: str, folder: Path) -> None:
    digest = export_rsp(f"{moto_s3}/models/tiny", perturbed())
    encoder = load_encoder(f"{moto_s3}/models/tiny")
    images = encoder.preprocess(PICTURES)
    assert digest == encoder.digest and torch.equal(encoder.encode(images), load_encoder(folder).encode(images))
