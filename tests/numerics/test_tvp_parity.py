"""The video model against the reference numbers and a plain statement of its equations, in value and gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from infra.settings import Settings
from tests.helpers_tvp import randoms, tiny_model, untouched_unet
from tests.numerics.tvp_plain import latent_path_loss, pixel_path_loss
from training.models.tvp import TextGuidedVideoModel, TVPConfig, TVPDraws, UNetConfig, VAEConfig, encode_text
from training.models.tvp.schedule import karras_sigmas, start_scale

GOLDEN_CONFIG = TVPConfig(
    unet=UNetConfig(
        block_out_channels=(32, 32, 64, 64), layers_per_block=2, num_attention_heads=(2, 2, 4, 4),
        cross_attention_dim=32, addition_time_embed_dim=8, sample_size=48,
    ),
    vae=VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
)  # fmt: skip
LATENT_DRAWS = ("0_rand", "1_randn", "2_randn_like")


@pytest.fixture(scope="module")
def golden():
    folder = Settings().golden
    if not folder:
        pytest.skip("FOREFRAME_GOLDEN is not set")
    return np.load(Path(folder) / "tvp_reference.npz", allow_pickle=False)


@pytest.fixture(scope="module")
def golden_model():
    folder = Settings().golden
    if not folder:
        pytest.skip("FOREFRAME_GOLDEN is not set")
    weights: dict[str, torch.Tensor] = {}
    for part in "ab":
        with np.load(Path(folder) / f"tvp_reference_weights_{part}.npz", allow_pickle=False) as stored:
            weights.update({name: torch.from_numpy(stored[name]).float() for name in stored.files})
    model = TextGuidedVideoModel.random(GOLDEN_CONFIG)
    model.unet.load_state_dict({name[7:]: value for name, value in weights.items() if name.startswith("unet/w/")})
    encoder = {name[6:]: value for name, value in weights.items() if name.startswith("vae/w/")}
    missing = model.vae.load_state_dict(encoder, strict=False)  # the reference leaves the decoder out
    assert not missing.unexpected_keys
    assert all(name.startswith("decoder.") for name in missing.missing_keys)
    return model.eval()


def tensor(golden, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(golden[name]).to(dtype)


def golden_case(golden, dtype: torch.dtype = torch.float32):
    draws = TVPDraws(*(tensor(golden, f"loss/latent_path/draw/{name}", dtype) for name in LATENT_DRAWS))
    return tensor(golden, "loss/in/latents", dtype), tensor(golden, "loss/in/encoder_hidden_states", dtype), draws


def test_golden_loss_of_the_latent_path(golden, golden_model) -> None:
    latents, tokens, draws = golden_case(golden)
    loss = golden_model.training_loss(latents, tokens, draws).item()
    assert loss == pytest.approx(float(golden["loss/latent_path/out/loss"]), rel=1e-5)


def test_golden_gradient_is_the_slope_of_the_loss(golden, golden_model) -> None:
    latents, tokens, draws = golden_case(golden, torch.float64)
    model = TextGuidedVideoModel.random(GOLDEN_CONFIG).double()
    model.load_state_dict(golden_model.state_dict())
    assert_slope(
        model, lambda: model.training_loss(latents[:, :3], tokens, draws._replace(latent_noise=draws[2][:, :3]))
    )


@pytest.mark.parametrize("num_steps", [10, 20, 30])
def test_golden_features(golden, golden_model, num_steps: int) -> None:
    features = golden_model.extract_features(
        tensor(golden, "feat/in/obs_latents_scaled"), tensor(golden, "loss/in/encoder_hidden_states"),
        unit_noise=tensor(golden, "feat/draw/init_noise_unit"), num_steps=num_steps,
    )  # fmt: skip
    expected = golden["feat/latents_all_idx1/out/features"]
    assert features.shape == expected.shape == tuple(golden["feat/latents_all_idx1/out/shape"])
    assert np.linalg.norm(features.numpy() - expected) <= 1e-5 * np.linalg.norm(expected)


def test_golden_schedule(golden) -> None:
    sigmas = karras_sigmas(30)
    assert sigmas.numpy() == pytest.approx(golden["sched/30/sigmas"], rel=1e-6)
    assert (sigmas[:-1].log() / 4).numpy() == pytest.approx(golden["sched/30/timesteps"], rel=1e-6)
    assert start_scale() == pytest.approx(float(golden["sched/30/init_noise_sigma"]), rel=1e-6)


def test_golden_text_tokens(golden) -> None:
    states = tensor(golden, "text/in/last_hidden_state_f16")
    coded = encode_text(states, position_code=True)
    assert coded[:, 0].numpy() == pytest.approx(golden["text/out/with_pos_first_token"], abs=1e-6)
    code = coded[:, :, :512] - states
    assert code[0].numpy() == pytest.approx(golden["text/out/pos_encoding_20x512"], abs=2e-6)
    assert torch.equal(coded[..., :512], coded[..., 512:])
    assert torch.equal(encode_text(states, position_code=False), torch.cat([states, states], dim=-1))


def assert_slope(model: TextGuidedVideoModel, loss) -> None:
    """The analytic gradient along random directions against central differences of the loss, all UNet weights moved."""
    weights = list(model.unet.parameters())
    model.zero_grad()
    loss().backward()
    assert all(weight.grad is not None for weight in weights)
    normal = randoms(3, torch.float64)
    for _ in range(2):
        direction = [normal(*weight.shape) * weight.abs().mean() for weight in weights]
        analytic = sum((weight.grad * way).sum().item() for weight, way in zip(weights, direction, strict=True))
        values = []
        for move in (1e-5, -2e-5):  # to +h, then to -h
            with torch.no_grad():
                for weight, way in zip(weights, direction, strict=True):
                    weight.add_(way, alpha=move)
            values.append(loss().item())
        with torch.no_grad():
            for weight, way in zip(weights, direction, strict=True):
                weight.add_(way, alpha=1e-5)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(analytic, rel=1e-5)


def tiny_case(dtype: torch.dtype, *, clips: int = 3):
    normal = randoms(7, dtype)
    model = tiny_model(dtype=dtype)
    pixels = (0.5 * normal(clips, 4, 3, 32, 32)).clamp(-1, 1)
    latents, tokens = normal(clips, 4, 4, 8, 8), normal(clips, 5, 768)
    keep = torch.tensor([0.3, 0.02, 0.9][:clips], dtype=dtype)
    draws = TVPDraws(
        keep, normal(clips, 1, 1, 1, 1), normal(clips, 4, 4, 8, 8), normal(clips), normal(clips, 1, 3, 32, 32)
    )
    return model, pixels, latents, tokens, draws


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_latent_path_is_the_plain_statement(dtype: torch.dtype, tolerance: float) -> None:
    model, _, latents, tokens, draws = tiny_case(dtype)
    plain = latent_path_loss(
        untouched_unet(model), latents, tokens, keep_uniform=draws.text_keep, sigma_normal=draws.sigma_noise,
        noise=draws.latent_noise, factor=0.4,
    )  # fmt: skip
    assert model.training_loss(latents, tokens, draws).item() == pytest.approx(plain.item(), rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_pixel_path_is_the_plain_statement(dtype: torch.dtype, tolerance: float) -> None:
    model, pixels, _, tokens, draws = tiny_case(dtype)
    plain = pixel_path_loss(
        untouched_unet(model), model.vae, pixels, tokens, keep_uniform=draws.text_keep, sigma_normal=draws.sigma_noise,
        noise=draws.latent_noise, image_normal=draws.image_sigma_noise, image_noise=draws.image_noise, factor=0.4,
    )  # fmt: skip
    assert model.training_loss(None, tokens, draws, pixels=pixels).item() == pytest.approx(plain.item(), rel=tolerance)


def test_gradients_of_both_paths_are_slopes() -> None:
    model, pixels, latents, tokens, draws = tiny_case(torch.float64, clips=2)
    assert_slope(model, lambda: model.training_loss(latents, tokens, draws))
    assert_slope(model, lambda: model.training_loss(None, tokens, draws, pixels=pixels))
    assert all(weight.grad is None for weight in model.vae.parameters())


def test_gradient_is_the_plain_statements() -> None:
    model, _, latents, tokens, draws = tiny_case(torch.float64, clips=2)
    model.training_loss(latents, tokens, draws).backward()
    own = [weight.grad for weight in model.unet.parameters()]
    unet = untouched_unet(model)
    latent_path_loss(
        unet, latents, tokens, keep_uniform=draws.text_keep, sigma_normal=draws.sigma_noise,
        noise=draws.latent_noise, factor=0.4,
    ).backward()  # fmt: skip
    for weight, gradient in zip(unet.parameters(), own, strict=True):
        assert (weight.grad - gradient).norm() <= 1e-9 * (1e-6 + gradient.norm())
