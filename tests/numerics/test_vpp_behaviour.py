"""What the policy's parts promise besides their equations: draws, masks, dropout, freezing, samplers, schedules."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from infra.errors import ConfigError
from tests.helpers_tvp import randoms
from training.models.vpp.config import ActionDenoiserConfig, SamplingConfig, VideoFormerConfig
from training.models.vpp.denoiser import ActionDenoiser
from training.models.vpp.former import VideoFormer
from training.models.vpp.sampler import noise_levels, num_step_draws, run_sampler

SMALL = ActionDenoiserConfig(
    action_dim=4, chunk=5, token_dim=24, num_tokens=6, goal_dim=8, proprioception_dim=3, dim=32, encoder_layers=2,
    decoder_layers=2, num_heads=4, train_proprioception=True,
)  # fmt: skip
FORMER = VideoFormerConfig(condition_dim=10, dim=24, depth=2, num_frames=3, num_latents=2, num_heads=2, head_dim=8)


def denoiser(**changes: object) -> ActionDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ActionDenoiser(SMALL.model_copy(update=changes))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def former(**changes: object) -> VideoFormer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return VideoFormer(FORMER.model_copy(update=changes)).eval()


def case(clips: int = 3) -> dict[str, torch.Tensor]:
    normal = randoms(4)
    return {
        "tokens": normal(clips, 6, 24),
        "goal": normal(clips, 1, 8),
        "actions": normal(clips, 5, 4),
        "proprioception": normal(clips, 1, 3),
        "sigma": torch.linspace(0.1, 3.0, clips),
        "noise": normal(clips, 5, 4),
    }


# The loss


def test_weighted_loss_is_the_sum_of_weighted_parts() -> None:
    """As the release writes it: each part's mean times its share of the dimensions, times its weight."""
    model, given = denoiser(), case()
    error = model.squared_error(**given)
    parts = [(slice(0, 1), 2.0), (slice(1, 3), 2.0), (slice(3, 4), 1.0)]
    expected = sum(
        weight * error[..., place].mean() * (place.stop - place.start) / 4 for place, weight in parts
    )  # fmt: skip
    found = model.loss(**given, weights=torch.tensor([2.0, 2.0, 2.0, 1.0]))
    torch.testing.assert_close(found, expected)
    broadcast = model.loss(**given, weights=torch.tensor([2.0, 2.0, 2.0, 1.0]).expand(3, 5, 4))
    torch.testing.assert_close(broadcast, expected)


def test_masked_actions_have_no_part_in_the_loss() -> None:
    model, given = denoiser(), case()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    error = model.squared_error(**given)
    of_clips = [error[clip][mask[clip]].mean() for clip in (0, 1)]
    torch.testing.assert_close(model.loss(**given, mask=mask), torch.stack([*of_clips, torch.zeros(())]).mean())
    per_clip = model.per_sample_loss(**given, mask=mask)
    torch.testing.assert_close(per_clip, torch.stack([error[0].mean(), error[1, :2].mean(), torch.tensor(0.0)]))
    assert model.loss(**given, mask=torch.zeros_like(mask)).item() == 0


def test_loss_per_clip_does_not_depend_on_the_other_clips() -> None:
    model, given = denoiser(), case()
    together = model.per_sample_loss(**given)
    alone = torch.cat(
        [model.per_sample_loss(**{name: value[n : n + 1] for name, value in given.items()}) for n in range(3)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.mean(), model.loss(**given))


def test_draws_come_from_the_generator_levels_first() -> None:
    model, given = denoiser(), case()
    drawn = {name: given[name] for name in ("tokens", "goal", "actions", "proprioception")}
    found = model.loss(**drawn, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    sigma = model.sigma_from_uniform(torch.rand(3, dtype=torch.float64, generator=generator))
    noise = torch.randn(3, 5, 4, generator=generator)
    assert torch.equal(found, model.loss(**drawn, sigma=sigma, noise=noise))


def test_training_levels_are_truncated_log_logistic() -> None:
    sigma = denoiser().sigma_from_uniform(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert sigma.dtype == torch.float32
    assert sigma.numpy() == pytest.approx([0.001, 0.5, 80.0], rel=1e-4)  # cut at both ends: the median hardly moves
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = denoiser().sigma_from_uniform(uniform)
    # Half of a log-logistic distribution of scale 1/2 lies between the median times 3 to the power of -1/2 and 1/2.
    inside = ((drawn > 0.5 / math.sqrt(3)) & (drawn < 0.5 * math.sqrt(3))).double().mean()
    assert float(inside) == pytest.approx(0.5, abs=0.005)


def test_dropout_counts_in_training_mode_only() -> None:
    model, given = denoiser(), case()
    assert torch.equal(model.loss(**given), model.loss(**given))
    model.train()
    torch.manual_seed(0)
    first, second = model.loss(**given), model.loss(**given)
    assert not torch.equal(first, second)
    none = denoiser(attention_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0)
    assert torch.equal(none.train().loss(**given), none.eval().loss(**given))


@pytest.mark.parametrize("kind", ["attention_dropout", "residual_dropout", "mlp_dropout"])
def test_each_dropout_rate_does_something(kind: str) -> None:
    rates = {"attention_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0} | {kind: 0.5}
    model, given = denoiser(**rates).train(), case()
    torch.manual_seed(0)
    assert not torch.equal(model.loss(**given), model.loss(**given))


def test_sampling_ignores_training_mode_and_leaves_it_as_it_was() -> None:
    model, given = denoiser(), case()
    call = {name: given[name] for name in ("tokens", "goal", "proprioception")} | {"unit_noise": given["noise"]}
    expected = model.sample(**call)
    assert torch.equal(model.train().sample(**call), expected)
    assert model.training
    with pytest.raises(ConfigError, match="unknown sampler 'leapfrog'"):
        model.sample(**call, sampler="leapfrog")
    assert model.training


def test_sampling_starts_at_the_first_of_the_levels() -> None:
    model, given = denoiser(), case()
    levels = noise_levels(SamplingConfig(sigma_min=0.1, sigma_max=10.0, num_steps=4))
    condition = {name: given[name] for name in ("goal", "proprioception")}
    denoise = model.denoise_function(given["tokens"], **condition, sigmas=levels)
    expected = run_sampler("heun", denoise, 10.0 * given["noise"], levels)
    found = model.sample(given["tokens"], **condition, unit_noise=given["noise"], sigmas=levels, sampler="heun")
    torch.testing.assert_close(found, expected)


def test_defaults_are_the_releases_choices() -> None:
    released = ActionDenoiserConfig(proprioception_dim=8, dim=32, num_heads=4)
    assert released.causal_cross_attention
    assert (released.attention_dropout, released.residual_dropout, released.mlp_dropout) == (0.3, 0.1, 0.05)
    assert not any(weight.requires_grad for weight in ActionDenoiser(released).proprio_emb.parameters())


def test_what_the_release_freezes_is_frozen_and_all_else_learns() -> None:
    model, given = denoiser(), case()
    model.loss(**given).backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert without == frozen == {name for name in without if name.startswith(("pos_emb", "goal_emb"))} != set()
    for still in (denoiser(train_proprioception=False), denoiser(proprioception_dim=0)):
        assert not any(weight.requires_grad for weight in still.proprio_emb.parameters())


def test_autocast_keeps_the_loss_in_float32_and_near() -> None:
    model, given = denoiser(), case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.loss(**given)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(model.loss(**given).detach()), rel=0.05)


@pytest.mark.parametrize(
    ("name", "shape"), [("goal", (3, 8)), ("goal", (3, 1, 9)), ("proprioception", (3, 1, 4)), ("actions", (3, 6, 4))]
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"{name} \({', '.join(map(str, shape))}\) where the denoiser takes"):
        denoiser().loss(**case() | {name: torch.zeros(shape)})


# Video-Former


def test_frames_stay_apart_without_temporal_attention_and_mix_with_it() -> None:
    features = randoms(6)(1, 3, 5, 10)
    other = features.clone()
    other[:, 2] += 1
    for kind, apart in (("2d", True), ("3d", False)):
        model = former(kind=kind)
        moved = (model(features) - model(other)).abs().amax(dim=-1).unflatten(1, (3, 2))[0]
        assert (moved[:2].max() == 0) == apart
        assert moved[2].min() > 0


def test_without_a_former_every_token_is_kept_in_frame_order() -> None:
    model, features = former(kind="linear"), randoms(6)(2, 7, 5, 10)
    tokens = model(features)
    assert tokens.shape == (2, 35, 24)
    torch.testing.assert_close(tokens[1, 5 * 3 + 4], model.project(features[1, 3, 4]))


def test_features_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"features \(1, 4, 5, 10\) where the Video-Former takes \(B, 3, N, 10\)"):
        former()(torch.zeros(1, 4, 5, 10))
    with pytest.raises(ConfigError, match="neither time embedding nor extra tokens"):
        former(kind="linear")(torch.zeros(1, 3, 5, 10), mask=torch.ones(1, 3, dtype=torch.bool))


def test_autocast_keeps_the_tokens_near() -> None:
    model, features = former(), randoms(6)(2, 3, 5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(features)
    expected = model(features)
    assert float((found - expected).norm().detach()) < 0.03 * float(expected.norm().detach())


# Samplers, on Gaussian data: the best denoiser and the path of the ODE are known.

MEAN, DEVIATION = 0.4, 0.5


def gaussian(noisy: torch.Tensor, sigma: float) -> torch.Tensor:
    return (DEVIATION**2 * noisy + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)


def on_the_path(start: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
    shrunk = math.sqrt((DEVIATION**2 + following**2) / (DEVIATION**2 + sigma**2))
    return MEAN + (start - MEAN) * shrunk


def ode_error(name: str, steps: int, *, low: float) -> float:
    sigmas = noise_levels(SamplingConfig(num_steps=steps, sigma_min=low)).double()
    start = 80 * randoms(8, torch.float64)(4, 3, 2)
    expected = on_the_path(start, float(sigmas[0]), 0.0)
    return float((run_sampler(name, gaussian, start, sigmas) - expected).abs().max())


@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm_2", 2), ("dpmpp_2s", 2), ("dpmpp_2m", 2), ("lms", 3)],
)
def test_samplers_follow_the_ode_with_their_order(name: str, order: int) -> None:
    """Twice as many steps divide the error by 2 to the power of the order, at least."""
    coarse, fine = (ode_error(name, steps, low=1e-4) for steps in (100, 200))
    assert coarse < 0.1
    assert math.log2(coarse / fine) > order - 0.35


def test_stochastic_samplers_are_the_published_updates() -> None:
    """k-diffusion's formulas in t = -ln(sigma), written out."""
    sigmas = noise_levels(SamplingConfig(num_steps=6, sigma_min=0.02)).double()
    normal = randoms(11, torch.float64)
    start = 80 * normal(2, 3, 2)

    def split(sigma: float, following: float) -> tuple[float, float]:
        up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
        return (following**2 - up**2) ** 0.5, up

    noise, state = normal(num_step_draws("euler_ancestral", 6), 2, 3, 2), start
    for n, (now, then) in enumerate(pairwise(sigmas.tolist())):
        down, up = split(now, then)
        state = state + (state - gaussian(state, now)) / now * (down - now) + (noise[n] * up if then else 0)
    torch.testing.assert_close(run_sampler("euler_ancestral", gaussian, start, sigmas, step_noise=noise), state)

    noise, state = normal(num_step_draws("dpmpp_sde", 6), 2, 3, 2), start
    for n, (now, then) in enumerate(pairwise(sigmas.tolist())):
        if not then:
            state = gaussian(state, now)
            break
        middle = math.exp((math.log(now) + math.log(then)) / 2)
        path = {middle: noise[2 * n] * (now - middle) ** 0.5}
        path[then] = path[middle] + noise[2 * n + 1] * (middle - then) ** 0.5
        reached, denoised = {}, gaussian(state, now)
        for goal in (middle, then):
            down, up = split(now, goal)
            step = -math.log(down) + math.log(now)
            reached[goal] = down / now * state - math.expm1(-step) * denoised + path[goal] / (now - goal) ** 0.5 * up
            denoised = gaussian(reached[goal], middle)
        state = reached[then]
    torch.testing.assert_close(run_sampler("dpmpp_sde", gaussian, start, sigmas, step_noise=noise), state)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde"])
def test_stochastic_samplers_end_in_the_data_distribution(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    start = 80 * torch.randn(4000, 5, 1, generator=generator, dtype=torch.float64)
    sigmas = noise_levels(SamplingConfig(num_steps=400, sigma_min=0.01))
    found = run_sampler(name, gaussian, start, sigmas, generator=generator)
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(found.std()) == pytest.approx(DEVIATION, rel=0.03)


@pytest.mark.parametrize("levels", [[1.0, 0.5], [0.5, 1.0, 0.0], [0.0], [1.0, 1.0, 0.0]])
def test_levels_that_do_not_fall_to_zero_are_refused(levels: list[float]) -> None:
    with pytest.raises(ConfigError, match="must fall and end in 0"):
        run_sampler("ddim", gaussian, torch.zeros(1, 1, 1), torch.tensor(levels))


def test_step_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"step_noise is \(1, 1, 1, 1\) where \(2, 1, 1, 1\) is needed"):
        run_sampler(
            "euler_ancestral", gaussian, torch.zeros(1, 1, 1), torch.tensor([3.0, 2.0, 1.0, 0.0]),
            step_noise=torch.zeros(1, 1, 1, 1),
        )  # fmt: skip


# Schedules


def levels(schedule: str, **changes: object) -> list[float]:
    return noise_levels(SamplingConfig(schedule=schedule, **changes)).tolist()


@pytest.mark.parametrize("schedule", ["exponential", "karras", "linear", "vp", "ve", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_levels_fall_to_zero_in_the_asked_number_of_steps(schedule: str, steps: int) -> None:
    found = levels(schedule, num_steps=steps)
    assert len(found) == steps + 1 and found[-1] == 0
    assert all(a > b for a, b in pairwise(found))
    if schedule not in ("vp", "cosine"):
        assert found[0] == pytest.approx(80, rel=1e-6)


def test_schedules_have_their_closed_forms() -> None:
    n = np.arange(10)
    assert levels("linear")[:-1] == pytest.approx(80 - n * (80 - 0.001) / 9, rel=1e-6)
    assert levels("exponential", sigma_min=1.0)[:-1] == pytest.approx(80 ** (1 - n / 9), rel=1e-6)
    assert levels("karras")[:-1] == pytest.approx(
        (80 ** (1 / 7) * (1 - n / 9) + 0.001 ** (1 / 7) * n / 9) ** 7, rel=1e-6
    )
    # Variance preserving (Song 2021): 1 - exp of minus the integrated beta, over its complement.
    time = 1 - n * (1 - 1e-3) / 9
    kept = np.exp(-(0.1 * time + 19.9 * time**2 / 2))
    assert levels("vp")[:-1] == pytest.approx(np.sqrt((1 - kept) / kept), rel=1e-5)
    # As released, the steps of "ve" overshoot: n + 1 of them over a range meant for n - 1.
    assert levels("ve")[:-1] == pytest.approx(80 * (0.001 / 80) ** (n / 9 * 11 / 9), rel=1e-5)


def test_cosine_levels_are_those_of_the_cosine_schedule() -> None:
    """sigma² = (1 - a) / a of the share of signal a, taken relative to its largest value as EDM does."""
    place = np.arange(1, 1001)
    share = np.sin(np.pi / 2 * place / 1000 / 1.008) ** 2
    exact = np.sqrt(share[-1] / share - 1)
    for level in levels("cosine")[:-1]:
        assert np.abs(exact / level - 1).min() < 1e-4 or level == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "values", "said"),
    [
        (SamplingConfig, {"sigma_min": 90.0}, "must be below sigma_max"),
        (ActionDenoiserConfig, {"dim": 380}, "divisible by num_heads 8"),
        (VideoFormerConfig, {"dim": 380}, "divisible by num_heads 8"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(model, values, said) -> None:
    with pytest.raises(ConfigError, match=said):
        model.parse(values)
