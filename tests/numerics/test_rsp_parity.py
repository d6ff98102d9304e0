"""RSP against the reference numbers and against a plain statement of its equations, in value and gradient."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.settings import Settings
from tests.numerics.rsp_plain import PlainDraws, rsp_losses
from training.models.common.patches import random_masking
from training.models.rsp import RSP, RSPConfig, RSPDraws

TERMS = {
    "loss": "loss_total",
    "loss_future": "loss_post",
    "loss_prior": "loss_prior",
    "loss_kl": "loss_kl",
    "kl": "kl_value",
    "loss_masked": "loss_mae",
}
OTHER_SIZES = RSPConfig(
    image_size=48, patch_size=8, embed_dim=48, depth=3, num_heads=4, decoder_embed_dim=32, decoder_depth=2,
    decoder_num_heads=4, num_latents=5, num_classes=7, mask_ratio=0.6, noise_scale=0.3, kl_scale=0.5, kl_balance=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    folder = Settings().golden
    if not folder:
        pytest.skip("FOREFRAME_GOLDEN is not set")
    return np.load(Path(folder) / "rsp_reference.npz", allow_pickle=False)


def golden_config(golden) -> RSPConfig:
    given = json.loads(str(golden["config_json"]))
    return RSPConfig(
        image_size=given["img_size"], patch_size=given["patch_size"], embed_dim=given["embed_dim"],
        depth=given["depth"], num_heads=given["num_heads"], decoder_embed_dim=given["decoder_embed_dim"],
        decoder_depth=given["decoder_depth"], decoder_num_heads=given["decoder_num_heads"],
        num_latents=given["stoch"], num_classes=given["discrete"], norm_pix_loss=given["norm_pix_loss"],
        kl_scale=given["kl_scale"], kl_balance=1 - given["kl_balance"], free_bits=given["kl_freebit"],
        mask_ratio=given["mask_ratio"], noise_scale=given["noise_scale"],
    )  # fmt: skip


class GoldenCase:
    def __init__(self, golden, dtype: torch.dtype) -> None:
        def tensor(key: str) -> torch.Tensor:
            return torch.from_numpy(golden[key]).to(dtype)

        self.config = golden_config(golden)
        self.weights = {key[2:]: tensor(key) for key in golden.files if key.startswith("w/")}
        self.images = tensor("in/x1"), tensor("in/x2")
        names = ("perturb_noise", "post_onehot", "prior_onehot", "mask_noise")
        self.draws = RSPDraws(*(tensor(f"rand/{name}") for name in names))


def relative(value: torch.Tensor, expected: np.ndarray) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(value.detach().double().numpy() - expected) / np.linalg.norm(expected))


def gradient_norms(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gradients = {name: value.grad for name, value in weights.items() if value.grad is not None}
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    names = ("to_prior.2.weight", "to_posterior.2.weight")
    return {"gradnorm_total": total, **{f"gradnorm/{name}": gradients[name].norm() for name in names}}


@pytest.mark.parametrize(("dtype", "prefix", "forward", "backward"), [
    (torch.float64, "out", 1e-10, 1e-10),
    (torch.float32, "out_float32", 1e-5, 1e-4),
])  # fmt: skip
def test_golden_losses_and_gradient_norms(golden, dtype, prefix, forward, backward) -> None:
    case = GoldenCase(golden, dtype)
    model = RSP.from_official(case.weights, case.config)
    output = model(*case.images, case.draws, prior_pass=True)
    for ours, theirs in TERMS.items():
        assert relative(getattr(output, ours), golden[f"{prefix}/{theirs}"]) < forward, ours
    output.loss.backward()
    for name, norm in gradient_norms(dict(model.named_parameters())).items():
        assert relative(norm, golden[name]) < backward, name


def test_golden_intermediate_outputs(golden) -> None:
    case = GoldenCase(golden, torch.float64)
    model = RSP.from_official(case.weights, case.config)
    current, future = case.images
    draws = case.draws
    source = model.encode(current)
    noisy = model.encode(future + case.config.noise_scale * draws.future_noise)
    posterior, prior = model.posterior_logits(source[:, 0], noisy[:, 0]), model.prior_logits(source[:, 0])
    masking = random_masking(draws.mask_noise, case.config.mask_ratio)
    found = {
        "h_src": source,
        "h_tgt_perturbed": noisy,
        "h_tgt_masked": model.encode(future, draws.mask_noise),
        "mask": masking.mask_BL,
        "ids_restore": masking.restore_BL,
        "post_logits": posterior,
        "prior_logits": prior,
        "pred_future_post": model.predict_patches(model.future_memory(source, draws.posterior_sample.flatten(1))),
        "pred_future_prior": model.predict_patches(model.future_memory(source, draws.prior_sample.flatten(1))),
        "pred_masked": model.predict_patches(model.masked_memory(future, masking), masked=True),
    }
    for name, value in found.items():
        assert relative(value, golden[f"out/{name}"]) < 1e-10, name


def test_golden_is_met_by_the_plain_statement(golden) -> None:
    case = GoldenCase(golden, torch.float64)
    weights = {name: value.requires_grad_("pos_embed" not in name) for name, value in case.weights.items()}
    losses = rsp_losses(weights, *case.images, PlainDraws(*case.draws), case.config)
    for ours, theirs in TERMS.items():
        assert relative(losses[ours], golden[f"out/{theirs}"]) < 1e-10, ours
    losses["loss"].backward()
    for name, norm in gradient_norms(weights).items():
        assert relative(norm, golden[name]) < 1e-10, name


def perturbed_model(config: RSPConfig, seed: int = 0) -> RSP:
    """Every 1-D parameter off its initial value, so that a forgotten norm or bias shows."""
    torch.manual_seed(seed)
    model = RSP(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def some_inputs(config: RSPConfig, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, RSPDraws]:
    generator = torch.Generator().manual_seed(7)
    shape = (batch, 3, config.image_size, config.image_size)
    current, future, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    picks = torch.randint(config.num_classes, (2, batch, config.num_latents), generator=generator)
    posterior, prior = torch.nn.functional.one_hot(picks, config.num_classes).double()
    mask = torch.rand(batch, config.num_patches, generator=generator, dtype=torch.float64)
    return current, future, RSPDraws(noise, posterior, prior, mask)


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "medium"])  # decides between two attention kernels on a CPU
def test_model_equals_the_plain_statement_in_every_loss_and_gradient(matmul_precision, precision: str) -> None:
    matmul_precision(precision)
    config = OTHER_SIZES
    model = perturbed_model(config)
    current, future, draws = some_inputs(config)
    output = model(current, future, draws, prior_pass=True)
    output.loss.backward()

    plain = {name: value.detach().clone() for name, value in model.state_dict().items()}
    trained = dict(model.named_parameters())
    for name in trained:
        plain[name].requires_grad_()
    losses = rsp_losses(plain, current, future, PlainDraws(*draws), config)
    losses["loss"].backward()

    assert losses["kl"] > config.free_bits
    for name, expected in losses.items():
        assert relative(getattr(output, name), expected.detach().numpy()) < 1e-12, name
    for name, parameter in trained.items():
        assert relative(parameter.grad, plain[name].grad.numpy()) < 1e-9, name


def finite_difference(model: RSP, name: str, index: tuple[int, ...], terms, step: float = 1e-5) -> torch.Tensor:
    parameter = model.get_parameter(name).data
    values = []
    for sign in (1, -1):
        parameter[index] += sign * step
        values.append(terms())
        parameter[index] -= sign * step
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "to_prior.0.weight", "decoder_blocks.1.cattn.kv.weight"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    # The Gaussian latent, because a straight-through gradient is no derivative; at balance 1/2 the two stop-gradients
    # together give half of the KL's derivative.
    config = OTHER_SIZES.model_copy(update={"latent": "gaussian", "kl_balance": 0.5, "free_bits": 0.0})
    model = perturbed_model(config)
    current, future, draws = some_inputs(config)
    unit = torch.randn(len(current), config.num_latents, dtype=torch.float64)
    draws = draws._replace(posterior_sample=unit, prior_sample=unit)

    def terms() -> torch.Tensor:
        output = model(current, future, draws)
        return torch.stack([output.loss_future + output.loss_masked, config.kl_scale * output.kl]).detach()

    model(current, future, draws).loss.backward()
    index = (1, 2)
    reconstruction, divergence = finite_difference(model, name, index, terms)
    analytic = model.get_parameter(name).grad[index]
    assert analytic.item() == pytest.approx((reconstruction + 0.5 * divergence).item(), rel=1e-5, abs=1e-9)
