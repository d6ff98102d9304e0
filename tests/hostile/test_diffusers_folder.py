"""Weight folders that are incomplete, of something else, or would run code: one clear line each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from infra.errors import ConfigError, ForeframeError, InputError
from tests.helpers_tvp import tiny_model
from training.export import load_vae, load_video_model
from training.models.tvp.official import load_diffusers

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder as diffusers itself writes it, without any file of ours."""
    from diffusers import EulerDiscreteScheduler

    root = tmp_path_factory.mktemp("svd")
    model = tiny_model()
    model.unet.save_pretrained(root / "unet")
    model.vae.save_pretrained(root / "vae")
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        sigma_min=0.002, sigma_max=700.0, timestep_spacing="leading", timestep_type="continuous", steps_offset=1,
        use_karras_sigmas=True,
    ).save_pretrained(root / "scheduler")  # fmt: skip
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableVideoDiffusionPipeline"}))
    return root


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "svd"))


def refused(folder: Path, kind: type[ForeframeError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        load_diffusers(folder, position_code=None if kind is ConfigError else True)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_written_by_diffusers_loads(written: Path) -> None:
    model = load_diffusers(written, position_code=False)
    expected = tiny_model().state_dict()
    assert model.config.position_code is False
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert load_vae(written).scale == pytest.approx(0.4)


def test_position_code_must_be_said(folder: Path) -> None:
    assert "position code" in refused(folder, ConfigError)
    (folder / "foreframe.json").write_text('{"position_code": false}')
    assert load_diffusers(folder).config.position_code is False
    assert load_diffusers(folder, position_code=True).config.position_code is True


def test_own_record_with_unknown_keys_is_refused(folder: Path) -> None:
    (folder / "foreframe.json").write_text('{"position_code": true, "num_frame": 8}')
    assert "num_frames" in refused(folder, ConfigError)


def test_text_too_narrow_for_the_network_is_refused(folder: Path) -> None:
    (folder / "foreframe.json").write_text('{"position_code": true, "num_frames": 4, "image_size": 32}')
    predictor = load_video_model(folder)
    assert predictor.tokens(["push"]).shape == (1, 20, 768)
    predictor.model.unet.register_to_config(cross_attention_dim=1024)
    with pytest.raises(ConfigError, match=r"2 x 384 .* 1024"):
        predictor.tokens(["push"])


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "vae/config.json"])
def test_wrong_layout(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refused(folder)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    assert "layout" in refused(tmp_path / "nothing")


def test_an_address_is_no_folder() -> None:
    with pytest.raises(InputError, match="local folder"):
        load_diffusers("s3://bucket/svd", position_code=True)


def test_missing_weights(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).unlink()
    assert WEIGHTS in refused(folder)


def test_one_missing_weight_is_named(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    weights = safetensors.torch.load_file(path)
    del weights["conv_in.bias"]
    safetensors.torch.save_file(weights, path)
    assert "conv_in.bias is missing" in refused(folder)


def test_misshapen_weight_is_named(folder: Path) -> None:
    path = folder / "vae" / WEIGHTS
    weights = safetensors.torch.load_file(path)
    weights["quant_conv.bias"] = torch.zeros(3)
    safetensors.torch.save_file(weights, path)
    assert "quant_conv.bias is (3,)" in refused(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    torch.save(safetensors.torch.load_file(path), path.with_name("diffusion_pytorch_model.bin"))
    path.unlink()
    assert "pickled" in refused(folder)


def test_a_pickle_with_the_right_name_is_not_read(folder: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (folder / "ran",))

    torch.save({"conv_in.weight": Bomb()}, folder / "unet" / WEIGHTS)
    assert "no safetensors file" in refused(folder)
    assert not (folder / "ran").exists()


def test_truncated_weights(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])
    assert "no safetensors file" in refused(folder)


def test_another_architecture(folder: Path) -> None:
    edit(folder / "unet" / "config.json", _class_name="UNet2DConditionModel")
    assert "UNet2DConditionModel" in refused(folder)


@pytest.mark.parametrize(("part", "changes"), [
    ("unet/config.json", {"transformer_layers_per_block": 2}),
    ("unet/config.json", {"in_channels": 4}),
    ("unet/config.json", {"up_block_types": ["UpBlockSpatioTemporal"] * 3}),
    ("vae/config.json", {"down_block_types": ["Other"] * 3}),
    ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}),
    ("scheduler/scheduler_config.json", {"sigma_max": 80.0}),
])  # fmt: skip
def test_unsupported_settings(folder: Path, part: str, changes: dict) -> None:
    edit(folder / part, **changes)
    assert next(iter(changes)) in refused(folder)


def test_configs_that_are_no_objects(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("[1, 2]")
    assert "list" in refused(folder)
    (folder / "unet" / "config.json").write_text("{")
    assert "not JSON" in refused(folder)


def test_parts_of_weights(folder: Path) -> None:
    """The layout of weights in several files; one that leaves the folder or is missing is refused."""
    path = folder / "unet" / WEIGHTS
    weights = safetensors.torch.load_file(path)
    path.unlink()
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, chosen in halves.items():
        safetensors.torch.save_file({key: weights[key] for key in chosen}, folder / "unet" / name)
    index = {"weight_map": {key: name for name, chosen in halves.items() for key in chosen}}
    listing = folder / "unet" / f"{WEIGHTS}.index.json"
    listing.write_text(json.dumps(index))
    loaded = load_diffusers(folder, position_code=True).unet.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    (folder / "unet" / "b.safetensors").unlink()
    assert "b.safetensors" in refused(folder)
    listing.write_text(json.dumps({"weight_map": {"conv_in.bias": "../../secret.safetensors"}}))
    assert "outside" in refused(folder)


def test_half_precision_variant_is_widened(folder: Path) -> None:
    path = folder / "vae" / WEIGHTS
    weights = {name: value.half() for name, value in safetensors.torch.load_file(path).items()}
    path.unlink()
    safetensors.torch.save_file(weights, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    vae = load_diffusers(folder, position_code=True).vae
    assert vae.dtype == torch.float32
    assert torch.equal(vae.quant_conv.bias, weights["quant_conv.bias"].float())
