"""What RSP promises beyond parity: ablations, free bits, draws, precision, sizes, initialisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, InputError
from training.models.common.positions import resize_table, sincos_table
from training.models.rsp import RSP, RSPConfig, RSPDraws

SMALL = RSPConfig(
    image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=2,
    decoder_num_heads=2, num_latents=4, num_classes=6,
)  # fmt: skip
ABLATIONS = [
    {"latent": "none"},
    {"latent": "gaussian"},
    {"masked_autoencoding": False},
    {"separate_decoder": True},
    {"shared_projection": True},
    {"latent_fusion": "channels"},
    {"latent": "gaussian", "latent_fusion": "channels"},
    {"target_corruption": "mask", "target_mask_ratio": 0.95},
    {"noise_scale": 0.0},
    {"norm_pix_loss": False},
]


def build(seed: int = 0, **changes) -> RSP:
    torch.manual_seed(seed)
    return RSP(RSPConfig.parse(SMALL.to_json() | changes))


def frames(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    current, future = torch.randn(2, batch, 3, 32, 32, generator=generator)
    return current, future


def run(model: RSP, seed: int = 0, draws: RSPDraws | None = None, **options):
    return model(*frames(), draws, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_every_ablation_trains_all_its_parameters(changes: dict) -> None:
    # Free bits off: a clipped KL rightly leaves its networks without gradient.
    model = build(**changes, free_bits=0.0)
    output = run(model, prior_pass=True)
    expected = output.loss_future + model.config.kl_scale * output.loss_kl + output.loss_masked
    assert torch.equal(output.loss, expected)
    output.loss.backward()
    untrained = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert untrained == []


def test_deterministic_model_ignores_noise_and_has_no_kl() -> None:
    model = build(latent="none")
    first, second = (
        run(model, draws=RSPDraws(mask_noise=torch.rand(4, 16, generator=torch.Generator().manual_seed(1))), seed=seed)
        for seed in (0, 1)
    )
    assert first == second
    assert first.kl == first.loss_kl == 0


def test_without_masked_autoencoding_the_term_and_its_projection_are_gone() -> None:
    model = build(masked_autoencoding=False)
    assert run(model).loss_masked == 0
    assert not any("mae" in name for name in model.state_dict())


def test_separate_decoders_each_learn_from_one_objective() -> None:
    model = build(separate_decoder=True)
    run(model).loss_masked.backward()
    assert model.masked_mask_token.grad is not None and model.masked_decoder_pred.weight.grad is not None
    assert model.mask_token.grad is None and model.decoder_pred.weight.grad is None


def test_target_masking_hides_patches_from_the_posterior_only() -> None:
    model = build(target_corruption="mask", target_mask_ratio=0.75)
    current, future = frames()
    noise = torch.arange(16.0).expand(4, -1)  # patches 0 to 3, the first row of the grid, stay
    draws = RSPDraws(noise, torch.ones(4, 4, 6), torch.ones(4, 4, 6), noise)
    hidden = future.clone()
    hidden[:, :, 8:] += 1.0  # a constant shift of whole patches: the normalised targets stay as they are
    seen = future.clone()
    seen[:, :, :8] += 1.0
    base = model(current, future, draws)
    assert torch.allclose(model(current, hidden, draws).kl, base.kl, atol=1e-6)
    assert not torch.allclose(model(current, seen, draws).kl, base.kl, atol=1e-6)


def test_balance_decides_which_side_the_kl_trains() -> None:
    def norms(balance: float) -> tuple[float, float]:
        model = build(kl_balance=balance)
        run(model).kl.backward()
        return model.to_posterior[2].weight.grad.norm().item(), model.to_prior[2].weight.grad.norm().item()

    (posterior_8, prior_8), (posterior_5, prior_5) = norms(0.8), norms(0.5)
    assert prior_8 / prior_5 == pytest.approx(0.8 / 0.5, rel=1e-4)
    assert posterior_8 / posterior_5 == pytest.approx(0.2 / 0.5, rel=1e-4)


def test_free_bits_clip_the_batch_mean_and_stop_the_gradient() -> None:
    model = build(free_bits=1e3)
    output = run(model)
    assert output.loss_kl == 1e3 and output.kl < 1e3
    output.loss_kl.backward()
    assert not model.to_prior[2].weight.grad.any()


def test_draws_are_reproducible_and_the_prior_pass_does_not_shift_them() -> None:
    model = build()
    plain, again, with_prior = run(model), run(model), run(model, prior_pass=True)
    assert plain == again
    assert plain.loss == with_prior.loss and plain.loss_prior is None and with_prior.loss_prior > 0
    assert run(model, seed=1).loss != plain.loss


def test_posterior_draws_follow_the_probabilities() -> None:
    from training.models.rsp.latent import draw_sample

    config = RSPConfig(num_latents=1, num_classes=3)
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(20000, -1)
    shares = draw_sample(logits, config, torch.Generator().manual_seed(0)).mean(dim=(0, 1))
    assert torch.allclose(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.015)


def test_bfloat16_autocast_keeps_the_latent_arithmetic_in_float32() -> None:
    model = build()
    with torch.no_grad():  # an underflown prior probability: infinite in half precision
        model.to_prior[2].bias[0] = 200.0
    full = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(model)
        assert model.prior_logits(model.encode(frames()[0])[:, 0]).dtype == torch.float32
    assert half.loss.dtype == torch.float32
    assert half.kl.item() == pytest.approx(full.kl.item(), rel=0.02) and full.kl > 50
    assert half.loss_future.item() == pytest.approx(full.loss_future.item(), rel=0.02)


def test_a_model_learns_to_predict_the_future() -> None:
    model = build(mask_ratio=0.5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    stripes = torch.sin(torch.arange(32.0) * 0.6).expand(1, 3, 32, 32)
    losses = []
    for step in range(30):
        phase = torch.randint(32, (8,), generator=torch.Generator().manual_seed(step)).tolist()
        current = torch.cat([stripes.roll(shift, dims=-1) for shift in phase])
        output = model(current, current.roll(3, dims=-1), generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        losses.append(output.loss_future.item())
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


def test_predicted_pictures_are_rgb_and_need_the_future_for_a_posterior() -> None:
    model = build()
    current, future = frames()
    for picture in (
        model.predict_future(current),
        model.predict_future(current, future),
        model.predict_future(current, future, use_posterior=True),
    ):
        assert picture.shape == (4, 3, 32, 32) and picture.min() >= 0 and picture.max() <= 1
    with pytest.raises(InputError, match="needs the future"):
        model.predict_future(current, use_posterior=True)


def test_encode_takes_other_sizes_and_refuses_indivisible_ones() -> None:
    model = build()
    assert model.encode(torch.zeros(1, 3, 24, 48)).shape == (1, 1 + 3 * 6, 32)
    assert model.encode(torch.zeros(2, 3, 32, 32), torch.rand(2, 16)).shape == (2, 1 + 4, 32)
    with pytest.raises(InputError, match="patch size 8"):
        model.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(InputError, match="3x32x32"):
        model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))


def cubic_weight(distance: float) -> float:
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def sampling_matrix(old: int, new: int) -> np.ndarray:
    """Bicubic weights when the sampling step is old / (new + 0.1), border cells repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / (new + 0.1) - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += cubic_weight(at - tap)
    return matrix


def test_position_table_resize_follows_the_offset_rule() -> None:
    table = torch.randn(1, 1 + 4 * 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    resized = resize_table(table, (4, 4), (7, 5))
    grid = table[0, 1:].reshape(4, 4, 8).numpy()
    expected = np.einsum("ai,bj,ijd->abd", sampling_matrix(4, 7), sampling_matrix(4, 5), grid)
    assert np.allclose(resized[0, 1:].numpy(), expected.reshape(35, 8), atol=1e-6)
    assert torch.equal(resized[0, 0], table[0, 0])


def test_position_table_entries() -> None:
    table = sincos_table(16, (3, 5))[0]
    assert not table[0].any()
    row, column, k = 2, 3, 1
    entry = table[1 + row * 5 + column]
    frequency = 10000 ** (-k / 4)
    expected = [f(p * frequency) for p in (column, row) for f in (math.sin, math.cos)]
    assert entry[[k, 4 + k, 8 + k, 12 + k]].tolist() == pytest.approx(expected, abs=1e-6)


def test_initialisation_and_sizes_of_the_paper() -> None:
    torch.manual_seed(0)
    model = RSP(RSPConfig())
    assert sum(value.numel() for value in model.parameters()) == 59_006_208
    assert len(model.state_dict()) == 346
    qkv = model.blocks[0].attn.qkv
    assert qkv.weight.abs().max() <= math.sqrt(6 / (384 + 1152)) and not qkv.bias.any()
    assert model.patch_embed.proj.weight.abs().max() <= math.sqrt(6 / (384 + 768))
    assert model.patch_embed.proj.bias.abs().max() > 0  # the convolution's own default
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(("changes", "message"), [
    ({"patch_size": 7}, "image_size 32 is not divisible"),
    ({"masked_autoencoding": False, "separate_decoder": True}, "need masked_autoencoding"),
    ({"shared_projection": True, "latent_fusion": "channels"}, "other input widths"),
    ({"mask_ration": 0.5}, "Did you mean 'mask_ratio'"),
])  # fmt: skip
def test_configs_that_cannot_be_built_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RSPConfig.parse(SMALL.to_json() | changes)
