"""MAE against a plain statement of its equations, in value and gradient; against timm; official layouts."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch

from infra.errors import ConfigError, InputError
from tests.numerics.mae_plain import mae_loss
from training.models.common.images import to_pixels
from training.models.common.weights import read_checkpoint
from training.models.views.mae import MAE, MAEConfig

SIZES = MAEConfig(
    image_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, decoder_embed_dim=32, decoder_depth=2,
    decoder_num_heads=2,
)  # fmt: skip
VARIANTS = {
    "as published": SIZES,
    "raw pixels, one decoder block, other ratio": SIZES.model_copy(
        update={"norm_pix_loss": False, "decoder_depth": 1, "mask_ratio": 0.4, "mlp_ratio": 2.0}
    ),
}


def perturbed(config: MAEConfig) -> MAE:
    """Every parameter off its initial value, so that a forgotten norm or bias shows."""
    torch.manual_seed(0)
    model = MAE(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def some_inputs(config: MAEConfig, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(batch, 3, config.image_size, config.image_size, generator=generator, dtype=torch.float64)
    return images, torch.rand(batch, config.num_patches, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_every_gradient_are_those_of_the_plain_equations(config: MAEConfig) -> None:
    model = perturbed(config).double()
    images, noise = some_inputs(config)
    loss = model(images, mask_noise=noise).loss
    loss.backward()
    fixed = {"pos_embed", "decoder_pos_embed"}
    weights = {
        name: value.detach().clone().requires_grad_(name not in fixed) for name, value in model.state_dict().items()
    }
    plain = mae_loss(weights, images, noise, config)
    plain.backward()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    assert {name for name, _ in model.named_parameters()} == weights.keys() - fixed
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and weights[name].grad is not None, name
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-12, msg=name)


def test_what_is_not_given_is_drawn_from_the_generator() -> None:
    model, (images, _) = perturbed(SIZES).double(), some_inputs(SIZES)
    losses = [model(images, generator=torch.Generator().manual_seed(seed)).loss for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    given = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    assert model(images, mask_noise=given).loss == losses[0]


def test_encoding_is_timms_and_removed_patches_do_not_count() -> None:
    model = perturbed(SIZES)
    other = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=0, global_pool=""
    ).eval()  # fmt: skip
    other.load_state_dict({name: value for name, value in model.state_dict().items() if name in other.state_dict()})
    images, noise = some_inputs(SIZES)
    images = images.float()
    with torch.no_grad():
        assert torch.allclose(model.encode(images), other(images), atol=2e-5)
        seen = model.encode(images, noise)
        changed = images.clone()
        for sample, place in enumerate(noise.argsort(dim=1)[:, -1].tolist()):
            row, column = divmod(place, 4)
            changed[sample, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 9.0
        assert seen.shape == (3, 5, 48)
        assert torch.equal(model.encode(changed, noise), seen)
        assert not torch.equal(model.encode(changed), model.encode(images))


def test_reconstruction_shows_seen_patches_as_they_are() -> None:
    model, (images, noise) = perturbed(SIZES).double(), some_inputs(SIZES)
    shown, true = model.reconstruct(images, mask_noise=noise), to_pixels(images)
    order = noise.argsort(dim=1)
    for sample in range(3):
        for rank, place in enumerate(order[sample].tolist()):
            row, column = divmod(place, 4)
            window = (sample, slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            assert torch.equal(shown[window], true[window]) == (rank < 4)


def test_official_layouts_load(tmp_path: Path) -> None:
    model = perturbed(SIZES)
    state = model.state_dict()
    encoder = {name: value for name, value in state.items() if not name.startswith(("decoder", "mask"))}
    files = {
        "full.pth": {"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 799},
        "encoder.pth": {"model": encoder},
        "classifier.pth": {"model": {f"module.{name}": value for name, value in encoder.items()}
                           | {"module.head.weight": torch.zeros(2, 48), "module.head.bias": torch.zeros(2)}},
        "plain.pth": encoder,
    }  # fmt: skip
    images, noise = some_inputs(SIZES)
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        loaded = MAE.from_official(read_checkpoint(tmp_path / name), SIZES)
        assert torch.equal(loaded.encode(images.float()), model.encode(images.float())), name
        same = torch.equal(loaded(images.float(), mask_noise=noise).loss, model(images.float(), mask_noise=noise).loss)
        assert same == (name == "full.pth")


def test_tables_of_another_grid_are_resized_and_the_rest_must_fit() -> None:
    state = dict(perturbed(SIZES).state_dict())
    larger = MAE.from_official({"model": state}, SIZES.model_copy(update={"image_size": 48}))
    assert larger.pos_embed.shape == (1, 37, 48) and larger.decoder_pos_embed.shape == (1, 37, 32)
    same_size = perturbed(SIZES)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(larger.encode(images), same_size.encode(images), atol=1e-6)
    del state["norm.bias"]
    with pytest.raises(InputError, match=r"norm\.bias is missing"):
        MAE.from_official(state, SIZES)
    state = {name: value for name, value in state.items() if not name.startswith("decoder_pred")}
    state["norm.bias"] = torch.zeros(48)
    with pytest.raises(InputError, match=r"decoder_pred\.weight is missing"):
        MAE.from_official(state, SIZES)
    with pytest.raises(InputError, match="no tensor"):
        MAE.from_official({"model": {"cls_token": 3}}, SIZES)


@pytest.mark.parametrize("wrong", [{"mask_ratio": 0.0}, {"mask_ratio": 0.999}, {"decoder_num_heads": 3}])
def test_impossible_sizes_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        MAEConfig.parse(SIZES.to_json() | wrong)
