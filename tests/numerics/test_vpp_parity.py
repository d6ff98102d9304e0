"""Video-Former and action denoiser against the reference numbers and against a plain statement of the equations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from infra.settings import Settings
from tests.helpers_tvp import randoms
from tests.numerics import vpp_plain as plain
from training.models.vpp.config import ActionDenoiserConfig, SamplingConfig, VideoFormerConfig
from training.models.vpp.denoiser import ActionDenoiser
from training.models.vpp.former import VideoFormer
from training.models.vpp.sampler import noise_levels, run_sampler

FORMER = VideoFormerConfig(condition_dim=24, dim=32, depth=2, num_frames=4, num_latents=3, num_heads=4, head_dim=8)
DENOISER = ActionDenoiserConfig(
    token_dim=32, num_tokens=12, goal_dim=16, dim=32, encoder_layers=2, decoder_layers=2, num_heads=4
)
SIZES = {"encoder_layers": 2, "decoder_layers": 2, "heads": 4}
LEVELS = {
    "exp_0.001_80": SamplingConfig(),
    "exp_1_80": SamplingConfig(sigma_min=1.0),
    "karras_0.001_80": SamplingConfig(schedule="karras"),
}
PLAIN_LEVELS = {
    "exp_0.001_80": plain.exponential(10, 0.001, 80),
    "exp_1_80": plain.exponential(10, 1, 80),
    "karras_0.001_80": plain.karras(10, 0.001, 80),
}
FORWARD, GRADIENT, SAMPLED = 1e-5, 1e-4, 1e-4  # absolute, on values of about unit size


@pytest.fixture(scope="module")
def golden():
    folder = Settings().golden
    if not folder:
        pytest.skip("FOREFRAME_GOLDEN is not set")
    with np.load(Path(folder) / "vpp_reference.npz", allow_pickle=False) as stored:
        values = {name: torch.from_numpy(stored[name]) for name in stored.files}
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in values.items()}


@pytest.fixture(scope="module")
def golden_former(golden):
    return VideoFormer.from_official(below(golden, "vf3d/w/"), FORMER).eval()


@pytest.fixture(scope="module")
def golden_denoiser(golden):
    return ActionDenoiser.from_official(below(golden, "head/w/"), DENOISER).eval()


def below(values, prefix):
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def close(found, expected, tolerance) -> None:
    assert found.shape == expected.shape
    assert (found.detach() - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def head_case(golden):
    """tokens, goal, actions, sigma, noise."""
    names = ("in/state_images", "in/goal", "in/actions", "draw/sigma", "draw/noise")
    return [golden[f"head/{name}"] for name in names]


def test_golden_video_former(golden, golden_former) -> None:
    features = golden["vf3d/in/x"].clone().requires_grad_()
    tokens = golden_former(features)
    close(tokens, golden["vf3d/out/y"], FORWARD)
    tokens.square().sum().backward()
    close(features.grad, golden["vf3d/out/grad_x_of_sum_sq"], GRADIENT)


def test_golden_video_former_with_mask_and_extra_tokens(golden, golden_former) -> None:
    tokens = golden_former(golden["vf3d/in/x"], mask=golden["vf3d/in/mask"], extra=golden["vf3d/in/extra"])
    close(tokens, golden["vf3d/out/y_mask_extra"], FORWARD)


def test_golden_loss_context_and_raw_output(golden, golden_denoiser) -> None:
    tokens, goal, actions, sigma, noise = head_case(golden)
    loss = golden_denoiser.loss(tokens, goal, actions, sigma=sigma, noise=noise).detach()
    assert float(loss) == pytest.approx(float(golden["head/out/noprop/loss"]), rel=1e-6)
    context = golden_denoiser.encode(tokens, goal)
    close(context, golden["head/out/noprop/context"], FORWARD)
    raw = golden_denoiser.network(actions + sigma.view(-1, 1, 1) * noise, sigma, context)
    close(raw, golden["head/out/noprop/model_output"], FORWARD)


def test_golden_decoder_looks_at_the_context_causally(golden, golden_denoiser) -> None:
    tokens, goal, actions, sigma, _ = head_case(golden)
    context = golden_denoiser.encode(tokens, goal)
    plain_output = golden_denoiser.decode(actions, sigma.log() / 4, context)
    context[:, 5:] += 1
    shifted = golden_denoiser.decode(actions, sigma.log() / 4, context)
    close(shifted, golden["head/out/noprop/dec_only_context_shift5"], FORWARD)
    moved = (shifted - plain_output).abs().amax(dim=(0, 2))
    assert moved[:5].max() == 0 and moved[5:].min() > 1e-3


@pytest.mark.parametrize("levels", LEVELS)
def test_golden_sampling(golden, golden_denoiser, levels: str) -> None:
    tokens, goal, *_ = head_case(golden)
    unit_noise, sigmas = golden["head/draw/sampler_x0_unit"], noise_levels(LEVELS[levels])
    actions = golden_denoiser.sample(tokens, goal, unit_noise=unit_noise, sigmas=sigmas)
    close(actions, golden[f"head/out/noprop/ddim/{levels}/actions"], SAMPLED)
    seen: list[torch.Tensor] = []
    denoise = golden_denoiser.denoise_function(tokens, goal, sigmas=sigmas)

    def recorded(noisy, sigma):
        seen.append(denoise(noisy, sigma))
        return seen[-1]

    run_sampler("ddim", recorded, unit_noise * 80, sigmas)
    close(torch.stack(seen), golden[f"head/out/noprop/ddim/{levels}/denoised_per_step"], SAMPLED)


def test_golden_noise_levels_of_training(golden, golden_denoiser) -> None:
    uniform = golden["head/draw/loglogistic_u_float64"]
    sigma = golden_denoiser.sigma_from_uniform(uniform).double()
    share = share_below(sigma)
    expected = (share - share_below(0.001)) / (share_below(80.0) - share_below(0.001))
    assert expected.numpy() == pytest.approx(uniform.numpy(), abs=1e-7)


def test_golden_plain_statement_gives_the_reference_numbers(golden) -> None:
    """The equations that the other tests, and the benchmark, compare with."""
    former, head = below(golden, "vf3d/w/"), below(golden, "head/w/inner_model.")
    close(plain.video_former(former, golden["vf3d/in/x"], depth=2, heads=4), golden["vf3d/out/y"], FORWARD)
    tokens, goal, actions, sigma, noise = head_case(golden)
    elements = plain.loss_elements(head, tokens, goal, actions, sigma=sigma, noise=noise, **SIZES)
    assert float(elements.mean()) == pytest.approx(float(golden["head/out/noprop/loss"]), rel=1e-6)
    for name, levels in PLAIN_LEVELS.items():
        actions, seen = plain.ddim(
            lambda x, now: plain.denoised(head, tokens, goal, x, torch.full((2,), now), **SIZES),
            golden["head/draw/sampler_x0_unit"] * 80,
            levels,
        )
        close(actions, golden[f"head/out/noprop/ddim/{name}/actions"], SAMPLED)
        close(seen, golden[f"head/out/noprop/ddim/{name}/denoised_per_step"], SAMPLED)


def share_below(sigma):
    """Log-logistic distribution function with median 0.5 and scale 0.5."""
    return 1 / (1 + (torch.as_tensor(sigma, dtype=torch.float64) / 0.5) ** -2)


# From here on no reference numbers are needed.


def moved_weights(module: torch.nn.Module, seed: int = 0):
    """In float64 with every weight off its start, so that a forgotten norm, bias or gate shows."""
    normal = randoms(seed, torch.float64)
    module.double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.2 * normal(*weight.shape))
    return module


@pytest.mark.parametrize("kind", ["3d", "2d"])
@pytest.mark.parametrize("given", ["features", "mask and extra"])
def test_video_former_is_the_plain_statement_in_value_and_gradient(kind: str, given: str) -> None:
    with torch.random.fork_rng(devices=[]):
        former = moved_weights(VideoFormer(FORMER.model_copy(update={"kind": kind, "num_heads": 2})))
    normal = randoms(1, torch.float64)
    features = normal(2, 4, 7, 24).requires_grad_()
    options = {}
    if given == "mask and extra":
        mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
        options = {"mask": mask, "extra": normal(2, 3, 32)}
    weights = dict(former.named_parameters())
    expected = plain.video_former(weights, features, depth=2, heads=2, temporal=kind == "3d", **options)
    compare(former(features, **options), expected, [features, *weights.values()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [12, 3, 0])
@pytest.mark.parametrize("state", [True, False])
def test_loss_is_the_plain_statement_in_value_and_gradient(causal: bool, tokens: int, state: bool) -> None:
    """Also with fewer context tokens than actions, and with none but the goal."""
    config = DENOISER.model_copy(
        update={
            "proprioception_dim": 5, "train_proprioception": True, "causal_cross_attention": causal,
            "action_dim": 3, "encoder_layers": 2, "decoder_layers": 3, "chunk": 6,
        }
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        denoiser = moved_weights(ActionDenoiser(config)).eval()
    normal = randoms(2, torch.float64)
    case = [normal(2, tokens, 32), normal(2, 1, 16), normal(2, 6, 3)]
    draws = {"sigma": torch.tensor([0.03, 7.0], dtype=torch.float64), "noise": normal(2, 6, 3)}
    proprioception = normal(2, 1, 5) if state else None
    weights = {name: value for name, value in denoiser.named_parameters() if value.requires_grad}
    everything = dict(denoiser.named_parameters())
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "heads": 4, "causal_context": causal}
    expected = plain.loss_elements(everything, *case, **draws, proprioception=proprioception, **sizes)
    found = denoiser.squared_error(*case, **draws, proprioception=proprioception)
    used = [value for name, value in weights.items() if state or not name.startswith("proprio_emb")]
    if not tokens:
        used = [
            value for value in used if value is not weights["tok_emb.weight"] and value is not weights["tok_emb.bias"]
        ]
    compare(found, expected, used)


def compare(found, expected, inputs) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    cotangent = randoms(9, torch.float64)(*expected.shape)
    found_slopes = torch.autograd.grad((found * cotangent).sum(), inputs)
    assert sum(float(slope.square().sum()) for slope in found_slopes) > 1
    slopes = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for one, other in zip(found_slopes, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("levels", LEVELS)
def test_sampling_is_the_plain_statement_with_the_context_encoded_at_every_step(levels: str, causal: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        config = DENOISER.model_copy(update={"proprioception_dim": 4, "causal_cross_attention": causal})
        denoiser = moved_weights(ActionDenoiser(config))  # in training mode: sampling has no dropout anyway
    normal = randoms(3, torch.float64)
    tokens, goal, state, unit_noise = normal(2, 12, 32), normal(2, 1, 16), normal(2, 1, 4), normal(2, 10, 7)
    sigmas = noise_levels(LEVELS[levels])
    found = denoiser.sample(tokens, goal, proprioception=state, unit_noise=unit_noise, sigmas=sigmas)
    assert denoiser.training
    weights = {name: value.detach() for name, value in denoiser.named_parameters()}
    sizes = SIZES | {"causal_context": causal}
    expected, _ = plain.ddim(
        lambda x, now: plain.denoised(
            weights, tokens, goal, x, torch.full((2,), now, dtype=torch.float64), proprioception=state, **sizes
        ),
        unit_noise * PLAIN_LEVELS[levels][0],
        PLAIN_LEVELS[levels],
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # our levels are float32
