"""What the video model tells its network, what dropout does, and what must not change a loss."""

from __future__ import annotations

import pytest
import torch

from infra.errors import ConfigError
from tests.helpers_tvp import TINY, randoms, tiny_model
from training.models.tvp import TVPDraws, encode_text
from training.models.tvp.model import Condition, x0_error
from training.models.tvp.schedule import precondition
from training.models.tvp.text import position_table


class Recorder:
    """Inputs of every call of a UNet's forward pass."""

    def __init__(self, unet) -> None:
        self.calls = []
        unet.register_forward_pre_hook(lambda _module, inputs: self.calls.append(inputs))

    @property
    def last(self):
        names = ("latents", "time", "text", "ids")
        return dict(zip(names, self.calls[-1], strict=True))


def case(seed: int = 0, clips: int = 2):
    normal = randoms(seed)
    return normal(clips, 4, 4, 8, 8), normal(clips, 5, 768), normal


def draws_of(normal, clips: int, keep: list[float]) -> TVPDraws:
    return TVPDraws(torch.tensor(keep), normal(clips, 1, 1, 1, 1), normal(clips, 4, 4, 8, 8))


def test_text_stays_where_its_number_is_above_the_dropouts_share() -> None:
    model = tiny_model()
    latents, tokens, normal = case(clips=4)
    seen = Recorder(model.unet)
    model.training_loss(latents, tokens, draws_of(normal, 4, [0.0499, 0.05, 0.0501, 0.9]))
    text = seen.last["text"]
    assert not text[:2].any()
    assert torch.equal(text[2:], tokens[2:])


def test_dropped_text_is_zeros_even_with_a_position_code() -> None:
    model = tiny_model()
    latents, _, normal = case()
    tokens = encode_text(torch.zeros(2, 5, 384), position_code=True)
    assert tokens.abs().sum() > 0
    seen = Recorder(model.unet)
    model.training_loss(latents, tokens, draws_of(normal, 2, [0.01, 0.01]))
    assert not seen.last["text"].any()


def test_validation_drops_no_text() -> None:
    model = tiny_model()
    latents, tokens, normal = case()
    seen = Recorder(model.unet)
    model.per_clip_loss(latents, tokens, sigma=torch.ones(2), noise=normal(2, 4, 4, 8, 8))
    assert torch.equal(seen.last["text"], tokens)


def test_latent_path_tells_the_unscaled_first_latent_and_three_numbers() -> None:
    model = tiny_model()
    latents, tokens, normal = case()
    seen = Recorder(model.unet)
    sigma = torch.tensor([0.5, 20.0])
    noise = normal(2, 4, 4, 8, 8)
    model.per_clip_loss(latents, tokens, sigma=sigma, noise=noise)
    given = seen.last["latents"]
    assert given.shape == (2, 4, 8, 8, 8)
    for frame in range(4):
        assert torch.allclose(given[:, frame, 4:], latents[:, 0] / 0.4)
    noisy = latents + sigma.view(2, 1, 1, 1, 1) * noise
    assert torch.allclose(given[:, :, :4], noisy / (sigma.square() + 1).sqrt().view(2, 1, 1, 1, 1))
    assert torch.allclose(seen.last["time"], sigma.log() / 4)
    assert torch.equal(seen.last["ids"], torch.tensor([[7.0, 127.0, 0.0]] * 2))


def test_pixel_path_puts_its_noise_on_pixels_and_tells_its_strength() -> None:
    model = tiny_model()
    _, tokens, normal = case()
    pixels = normal(2, 4, 3, 32, 32).clamp(-1, 1)
    units, noise = torch.tensor([-1.0, 2.0]), normal(2, 1, 3, 32, 32)
    seen = Recorder(model.unet)
    model.training_loss(None, tokens, TVPDraws(image_sigma_noise=units, image_noise=noise), pixels=pixels)
    strength = torch.exp(-3 + 0.5 * units)
    assert torch.allclose(seen.last["ids"][:, 2], strength)
    with torch.no_grad():
        noisy = pixels[:, 0] + strength.view(2, 1, 1, 1) * noise[:, 0]
        expected = model.vae.encode(noisy).latent_dist.mode()
    assert torch.allclose(seen.last["latents"][:, 3, 4:], expected, atol=1e-5)


def test_features_and_samples_tell_their_own_numbers() -> None:
    model = tiny_model()
    _, tokens, normal = case()
    image = normal(2, 3, 32, 32).clamp(-1, 1)
    ids = []
    model.unet.add_time_proj.register_forward_pre_hook(lambda _module, inputs: ids.append(inputs[0].reshape(-1, 3)))
    model.extract_features(image, tokens)
    model.sample(image, tokens, num_steps=1)
    model.sample(image, tokens, num_steps=1, fps=4)
    told = [[round(float(value), 5) for value in call[0]] for call in ids]
    assert told == [[4, 127, 0], [7, 127, 0.02], [4, 127, 0.02]]


def test_features_take_pictures_and_their_latents_alike() -> None:
    model = tiny_model()
    _, tokens, normal = case()
    image, noise = normal(2, 3, 32, 32).clamp(-1, 1), normal(2, 4, 4, 8, 8)
    from_pixels = model.extract_features(image, tokens, unit_noise=noise)
    mean, _ = model.encode(image[:, None])
    assert torch.allclose(from_pixels, model.extract_features(mean * 0.4, tokens, unit_noise=noise), atol=1e-5)
    assert from_pixels.shape == (2, 4, 128, 8, 8)


def test_feature_options() -> None:
    model = tiny_model()
    latents, tokens, normal = case()
    first, noise = latents[:, :1], normal(2, 4, 4, 8, 8)

    def features(**options):
        return model.extract_features(first, tokens, unit_noise=noise, **options)

    both = features(layers=(0, 1))
    last = features(layers=(0, 1), aggregate=False)
    lower = features(layers=(0,))
    assert torch.equal(both[:, :, 64:], last)
    assert lower.shape == (2, 4, 64, 4, 4)
    assert torch.equal(both[:, :, :64], lower.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2))
    smooth = features(interpolation="bilinear")
    assert torch.equal(smooth[:, :, 64:], last)
    assert not torch.equal(smooth[:, :, :64], both[:, :, :64])
    assert torch.equal(features(num_steps=10), both)  # the count moves no first step
    assert torch.equal(features(sigma=700.0), both)
    assert not torch.allclose(features(sigma=5.0), both)
    assert not torch.allclose(features(step=2, num_steps=10), both)
    assert features(layers=(0, 1, 2)).shape == (2, 4, 160, 8, 8)


def test_later_steps_tap_the_pass_after_plain_euler_steps() -> None:
    model = tiny_model()
    latents, tokens, normal = case()
    first, noise = latents[:, :1], normal(2, 4, 4, 8, 8)
    passes = []
    model.unet.conv_in.register_forward_pre_hook(lambda _module, inputs: passes.append(inputs[0].detach().clone()))
    model.extract_features(first, tokens, unit_noise=noise, step=3, num_steps=6)
    tapped = passes[-1]
    passes.clear()
    condition = model.image_condition(first)
    from training.models.tvp.sampler import euler_sample

    euler_sample(model, noise, tokens, condition, num_steps=6, guidance=(1.0, 1.0), fps=4)
    assert len(passes) == 6
    assert torch.allclose(passes[2], tapped, atol=1e-6)


@pytest.mark.parametrize("options", [
    {"layers": ()}, {"layers": (0, 3)}, {"layers": (1, 0)}, {"layers": (-1,)}, {"step": 0}, {"step": 4, "num_steps": 3},
    {"interpolation": "cubic"},
])  # fmt: skip
def test_features_that_do_not_exist_are_refused(options) -> None:
    model = tiny_model()
    latents, tokens, _ = case()
    with pytest.raises(ConfigError) as caught:
        model.extract_features(latents[:, :1], tokens, **options)
    assert "\n" not in str(caught.value)


def test_a_clips_loss_does_not_depend_on_its_neighbours() -> None:
    model = tiny_model(dtype=torch.float64)
    normal = randoms(1, torch.float64)
    latents, tokens, noise = normal(3, 4, 4, 8, 8), normal(3, 5, 768), normal(3, 4, 4, 8, 8)
    sigma = torch.tensor([0.3, 3.0, 30.0], dtype=torch.float64)
    together = model.per_clip_loss(latents, tokens, sigma=sigma, noise=noise)
    alone = [
        model.per_clip_loss(latents[i : i + 1], tokens[i : i + 1], sigma=sigma[i : i + 1], noise=noise[i : i + 1])
        for i in range(3)
    ]
    assert together.tolist() == pytest.approx(torch.cat(alone).tolist(), rel=1e-10)


def test_loss_coefficients_weigh_clips() -> None:
    model = tiny_model()
    latents, tokens, normal = case()
    draws = draws_of(normal, 2, [0.9, 0.9])
    sigma = model.sigmas(draws.sigma_noise, 2)
    per_clip = model.per_clip_loss(latents, tokens, sigma=sigma, noise=draws.latent_noise)
    weighted = model.training_loss(latents, tokens, draws, weights=torch.tensor([3.0, 0.5]))
    assert weighted.item() == pytest.approx((3 * per_clip[0] + 0.5 * per_clip[1]).item() / 2, rel=1e-5)


def test_checkpointed_activations_change_no_gradient() -> None:
    model = tiny_model(dtype=torch.float64)
    normal = randoms(2, torch.float64)
    latents, tokens = normal(1, 4, 4, 8, 8), normal(1, 5, 768)
    draws = TVPDraws(torch.tensor([0.9]), normal(1), normal(1, 4, 4, 8, 8))
    gradients = []
    for enabled in (False, True):
        model.checkpoint_activations(enabled)
        model.zero_grad()
        model.train()
        model.training_loss(latents, tokens, draws).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.unet.parameters()]))
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.unet.modules())
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


def test_only_the_unet_learns_and_the_autoencoder_stays_in_eval_mode() -> None:
    model = tiny_model().train()
    trained = {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"unet"}
    assert model.unet.training
    assert not any(part.training for part in model.vae.modules())


def test_autocast_leaves_latent_arithmetic_in_float32() -> None:
    """Were the EDM sums rounded to bfloat16, a perfect network's loss would not be zero."""
    model = tiny_model()
    latents, tokens, normal = case()
    sigma, noise = torch.tensor([0.02, 0.01]), normal(2, 4, 4, 8, 8)
    factors = precondition(sigma.view(2, 1, 1, 1, 1))

    class Perfect(torch.nn.Module):
        config, dtype = model.unet.config, torch.float32

        def forward(self, inputs, _time, _text, _ids):
            noisy = inputs[:, :, :4] / factors.c_in
            answer = (latents - factors.c_skip * noisy) / factors.c_out
            return type("Output", (), {"sample": answer})()

    model.unet = Perfect()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.per_clip_loss(latents, tokens, sigma=sigma, noise=noise)
        encoded, _ = model.encode(torch.zeros(1, 1, 3, 32, 32))
    assert loss.dtype == torch.float32
    assert loss.max() < 1e-5
    assert torch.equal(encoded, model.encode(torch.zeros(1, 1, 3, 32, 32))[0])


def test_decoding_does_not_depend_on_other_clips_and_uses_whole_chunks() -> None:
    model = tiny_model()
    latents, _, _ = case()
    chunks = []
    plain = model.vae.decode
    model.vae.decode = lambda z, num_frames: chunks.append((len(z), num_frames)) or plain(z, num_frames=num_frames)
    together = model.decode(latents, chunk=3)
    assert chunks == [(6, 3), (2, 1)]
    assert torch.allclose(together[1:], model.decode(latents[1:], chunk=3), atol=1e-5)
    assert not torch.allclose(together, model.decode(latents, chunk=1), atol=1e-3)
    with torch.no_grad():
        expected = plain(latents[0, :3] / 0.4, num_frames=3).sample.clamp(-1, 1)
    assert torch.allclose(together[0, :3], expected, atol=1e-5)


def test_moments_are_not_scaled_and_chunks_do_not_matter() -> None:
    model = tiny_model()
    pixels = randoms(4)(2, 4, 3, 32, 32).clamp(-1, 1)
    mean, std = model.encode(pixels, chunk=3)
    with torch.no_grad():
        posterior = model.vae.encode(pixels[1, 2:3]).latent_dist
    assert torch.allclose(mean[1, 2], posterior.mean[0], atol=1e-5)
    assert torch.allclose(std[1, 2], posterior.std[0], atol=1e-5)
    assert torch.allclose(mean, model.encode(pixels, chunk=100)[0], atol=1e-5)


def test_sizes_come_from_modules_and_tensors() -> None:
    """A config of the full size around small modules works: nothing is read from it that the modules know."""
    model = tiny_model()
    full = type(TINY)()
    assert full.unet.block_out_channels == (320, 640, 1280, 1280)
    own = type(model)(full, model.unet, model.vae)
    latents, tokens, normal = case()
    draws = draws_of(normal, 2, [0.9, 0.9])
    assert torch.equal(own.training_loss(latents, tokens, draws), model.training_loss(latents, tokens, draws))
    assert own.scale == 0.4
    assert own.true_config().unet == TINY.unet
    assert own.true_config().vae == TINY.vae


def test_position_code_is_sines_then_cosines() -> None:
    table = position_table(3, 4)
    expected = [[0, 0, 1, 1], [0.841471, 0.0099998, 0.540302, 0.99995], [0.909297, 0.0199987, -0.416147, 0.9998]]
    assert torch.allclose(table, torch.tensor(expected), atol=1e-5)


def test_error_of_a_perfect_denoiser_is_zero_and_small_sigmas_weigh_more() -> None:
    latents, _, _ = case()
    assert not x0_error(latents, latents, torch.tensor([1.0, 5.0])).any()
    shifted = x0_error(latents + 1, latents, torch.tensor([0.5, 2.0]))
    assert shifted.tolist() == pytest.approx([5.0, 1.25], rel=1e-5)


def test_condition_may_be_given() -> None:
    model = tiny_model()
    latents, tokens, normal = case()
    seen = Recorder(model.unet)
    own = Condition(normal(2, 1, 4, 8, 8), torch.tensor([0.1, 0.2]))
    model.per_clip_loss(latents, tokens, sigma=torch.ones(2), noise=normal(2, 4, 4, 8, 8), condition=own)
    assert torch.equal(seen.last["latents"][:, 1, 4:], own.raw_B1Chw[:, 0])
    assert torch.equal(seen.last["ids"][:, 2], own.strength_B)
