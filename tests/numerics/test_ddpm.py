"""Diffusion of action chunks, the 1-D UNet, the vision encoder: against independent libraries and plain statements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn
from torch.nn import functional as F

from infra.errors import ConfigError
from training.models.common.ddpm import ChunkDiffusion, DDPMConfig
from training.models.common.resnet import ResNetConfig, ResNetEncoder, spatial_softmax
from training.models.common.unet1d import ConditionalUNet1D, UNet1DConfig

SHARED = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


class Known(nn.Module):
    """A network whose answer depends on all that it is given."""

    def forward(self, chunk: torch.Tensor, steps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return 0.9 * chunk.roll(1, dims=1) + (steps / 100).view(-1, 1, 1) + condition[:, :1, None]


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize(
    ("sampler", "inference_steps"), [("ddim", 10), ("ddim", 16), ("ddpm", 10), ("ddpm", 16), ("ddpm", 100)]
)
def test_samples_equal_those_of_diffusers(sampler, inference_steps, prediction, monkeypatch):
    config = DDPMConfig(sampler=sampler, inference_steps=inference_steps, prediction=prediction)
    scheduler = SCHEDULERS[sampler](**SHARED, prediction_type=prediction)
    scheduler.set_timesteps(inference_steps)
    assert config.steps == tuple(scheduler.timesteps.tolist())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, config.draws, 8, 4, generator=generator)
    condition, model = torch.randn(3, 5, generator=generator), ChunkDiffusion(Known(), config)

    state, drawn = noise[:, 0], iter(noise[:, 1:].unbind(1))
    # Their DDPM step draws its noise itself: it gets ours.
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(drawn))
    for step in scheduler.timesteps:
        predicted = Known()(state, step.expand(3), condition)
        state = scheduler.step(predicted, step, state).prev_sample
    torch.testing.assert_close(model.sample(condition, noise), state, atol=1e-4, rtol=1e-5)
    assert next(drawn, None) is None


def test_noised_chunks_equal_those_of_diffusers():
    model, scheduler = ChunkDiffusion(Known(), DDPMConfig()), DDPMScheduler(**SHARED)
    clean, noise, steps = torch.randn(100, 4, 3), torch.randn(100, 4, 3), torch.arange(100)
    expected = scheduler.add_noise(clean, noise, steps)
    torch.testing.assert_close(model.noised(clean, noise, steps), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_the_loss_is_the_mean_square_of_what_was_not_predicted_over_the_actions_that_exist(prediction):
    random = np.random.default_rng(0)
    clean, noise = random.uniform(-1, 1, (3, 4, 2)), random.normal(size=(3, 4, 2))
    steps, condition = np.array([0, 40, 99]), random.normal(size=(3, 2))
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    beta = [min(1 - cosine((i + 1) / 100) / cosine(i / 100), 0.999) for i in range(100)]
    kept = np.cumprod(1 - np.array(beta))[steps][:, None, None]
    noisy = np.sqrt(kept) * clean + np.sqrt(1 - kept) * noise
    predicted = 0.9 * np.roll(noisy, 1, axis=1) + (steps / 100)[:, None, None] + condition[:, :1, None]
    expected = ((predicted - (noise if prediction == "epsilon" else clean)) ** 2) * mask[..., None]
    expected = (expected.sum(axis=(1, 2)) / (mask.sum(axis=1) * expected.shape[-1])).mean()  # a clip's own actions
    tensors = [torch.from_numpy(value).float() for value in (condition, clean, noise)]
    loss = ChunkDiffusion(Known(), DDPMConfig(prediction=prediction)).loss(
        *tensors[:2], steps_B=torch.from_numpy(steps), noise_BKD=tensors[2], mask_BK=torch.from_numpy(mask)
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_more_sampling_than_training_steps_are_refused():
    with pytest.raises(ConfigError, match="inference_steps 20 exceeds train_steps 10"):
        DDPMConfig.parse({"train_steps": 10, "inference_steps": 20})


def test_parameters_of_the_published_unet_follow_from_its_published_sizes():
    """Chi 2023: three levels, kernel 5, step code 128; here 2 pictures of 64 features and 9 numbers of state each."""
    widths, code, condition, actions = (512, 1024, 2048), 128, 128 + 2 * (64 + 9), 10

    def block(inputs: int, outputs: int) -> int:
        convolutions = inputs * outputs * 5 + outputs + outputs * outputs * 5 + outputs
        norms, film = 2 * 2 * outputs, (condition + 1) * 2 * outputs
        return convolutions + norms + film + (inputs * outputs + outputs if inputs != outputs else 0)

    a, b, c = widths
    step_code = (code + 1) * 4 * code + (4 * code + 1) * code
    down = block(actions, a) + block(a, a) + block(a, b) + block(b, b) + block(b, c) + block(c, c)
    halving = 3 * a * a + a + 3 * b * b + b
    up = block(2 * c, b) + block(b, b) + block(2 * b, a) + block(a, a)
    doubling = 4 * b * b + b + 4 * a * a + a
    out = 5 * a * a + a + 2 * a + a * actions + actions
    expected = step_code + down + halving + 2 * block(c, c) + up + doubling + out
    with torch.device("meta"):
        model = ConditionalUNet1D(UNet1DConfig(), action_dim=actions, condition_dim=condition - code)
    assert sum(weight.numel() for weight in model.parameters()) == expected


def test_the_unet_is_the_published_one_stated_plainly():
    torch.manual_seed(0)
    config = UNet1DConfig(channels=(16, 16, 32), groups=4, step_dim=8)
    model = ConditionalUNet1D(config, action_dim=3, condition_dim=5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    chunk, steps, condition = torch.randn(2, 8, 3), torch.tensor([0, 77]), torch.randn(2, 5)
    expected = plain_unet(dict(model.state_dict()), chunk, steps, condition)
    torch.testing.assert_close(model(chunk, steps, condition), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"kernel": 4}, "kernel 4 is even"), ({"channels": [12, 16]}, "divide by 8"), ({"step_dim": 7}, "step_dim 7")],
)
def test_unets_that_cannot_be_built_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        UNet1DConfig.parse(sizes)


def test_the_encoder_is_resnet18_with_group_norm():
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(norm_layer=lambda width: nn.GroupNorm(width // 16, width)).eval()
    model = ResNetEncoder(ResNetConfig()).eval()
    with torch.no_grad():
        for weight in reference.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight), alpha=0.2)
    weights = {name: value for name, value in reference.state_dict().items() if not name.startswith("fc.")}
    own = {name for name in model.state_dict() if not name.startswith(("keypoints.", "project."))}
    assert own == set(weights)
    model.load_state_dict(weights, strict=False)
    images = torch.randn(2, 3, 76, 76)
    seen = []
    reference.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    reference(images)
    maps = model.maps(images)
    assert maps.shape == (2, 512, 3, 3)
    torch.testing.assert_close(maps, seen[0], atol=1e-4, rtol=1e-4)
    assert model(images).shape == (2, 64)


def test_spatial_softmax_gives_column_and_row_of_the_peak():
    maps = torch.zeros(1, 2, 5, 3)
    maps[0, 0, 4, 1] = maps[0, 1, 1, 2] = 100.0
    torch.testing.assert_close(spatial_softmax(maps)[0], torch.tensor([[0.0, 1.0], [1.0, -0.5]]))


def cosine(time: float) -> float:
    return float(np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2)


def plain_unet(weights, chunk, steps, condition):
    """ConditionalUnet1D of the published code with its loops written out; every name is looked up once."""

    def linear(name, rows):
        return F.linear(rows, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def convolve(name, maps):
        weight = weights.pop(f"{name}.0.weight")
        maps = F.conv1d(maps, weight, weights.pop(f"{name}.0.bias"), padding=weight.shape[-1] // 2)
        return F.mish(F.group_norm(maps, 4, weights.pop(f"{name}.1.weight"), weights.pop(f"{name}.1.bias")))

    def block(name, maps):
        hidden = convolve(f"{name}.first", maps)
        scale, shift = linear(f"{name}.film.1", F.mish(seen)).unflatten(1, (2, -1)).unbind(1)
        hidden = convolve(f"{name}.second", scale[..., None] * hidden + shift[..., None])
        if f"{name}.skip.weight" in weights:
            maps = F.conv1d(maps, weights[f"{name}.skip.weight"], weights[f"{name}.skip.bias"])
        return hidden + maps

    def level(name, maps):
        return block(f"{name}.blocks.1", block(f"{name}.blocks.0", maps))

    frequencies = torch.tensor([10_000 ** (-k / 3) for k in range(4)])
    angles = steps[:, None] * frequencies
    code = linear("step_code.layers.0", torch.cat([angles.sin(), angles.cos()], dim=1))
    seen = torch.cat([linear("step_code.layers.2", F.mish(code)), condition], dim=1)
    maps, kept = chunk.transpose(1, 2), []
    for number in range(3):
        maps = level(f"down.{number}", maps)
        kept.append(maps)
        if number < 2:
            name = f"down.{number}.resize"
            maps = F.conv1d(maps, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1)
    maps = level("middle", maps)
    for number in range(2):
        maps = level(f"up.{number}", torch.cat([maps, kept.pop()], dim=1))
        name = f"up.{number}.resize"
        maps = F.conv_transpose1d(maps, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1)
    maps = convolve("out.0", maps)
    return F.conv1d(maps, weights["out.1.weight"], weights["out.1.bias"]).transpose(1, 2)
