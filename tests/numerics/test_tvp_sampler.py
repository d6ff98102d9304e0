"""Sampling against diffusers' own scheduler and pipeline."""

from __future__ import annotations

import pytest
import torch

from infra.errors import ConfigError
from tests.helpers_tvp import randoms, tiny_model
from training.models.tvp.official import SCHEDULER
from training.models.tvp.sampler import euler_sample
from training.models.tvp.schedule import guidance_ramp

# The scheduler's file in the release of Stable Video Diffusion.
RELEASED_SCHEDULER = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "v_prediction",
    "set_alpha_to_one": False, "sigma_max": 700.0, "sigma_min": 0.002, "skip_prk_steps": True, "steps_offset": 1,
    "timestep_spacing": "leading", "timestep_type": "continuous", "trained_betas": None, "use_karras_sigmas": True,
}  # fmt: skip


def case():
    normal = randoms(5)
    return tiny_model(), normal(2, 1, 4, 8, 8), normal(2, 5, 768), normal(2, 4, 4, 8, 8)


@torch.no_grad()
def diffusers_loop(model, first, tokens, noise, *, num_steps: int, guidance: tuple[float, float]):
    """Denoising as in diffusers' video pipeline, but with the first frame in both halves as in the VPP release."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_config(RELEASED_SCHEDULER)
    scheduler.set_timesteps(num_steps)
    latents = noise * scheduler.init_noise_sigma
    condition = (first / 0.4).repeat(1, noise.shape[1], 1, 1, 1)
    ids = torch.tensor([[7.0, 127.0, 0.02]] * len(noise))
    weights = torch.linspace(guidance[0], guidance[1], noise.shape[1]).view(1, -1, 1, 1, 1)
    for time in scheduler.timesteps:
        inputs = torch.cat([scheduler.scale_model_input(latents, time), condition], dim=2)
        without = model.unet(inputs, time, torch.zeros_like(tokens), ids).sample
        with_text = model.unet(inputs, time, tokens, ids).sample
        latents = scheduler.step(without + weights * (with_text - without), time, latents).prev_sample
    return latents


@pytest.mark.parametrize(
    ("num_steps", "guidance"), [(1, (1.0, 3.0)), (4, (1.0, 3.0)), (5, (2.0, 7.5)), (3, (1.0, 1.0))]
)
def test_samples_are_those_of_diffusers_scheduler(num_steps: int, guidance: tuple[float, float]) -> None:
    model, first, tokens, noise = case()
    own = model.sample(first, tokens, num_steps=num_steps, guidance=guidance, unit_noise=noise)
    theirs = diffusers_loop(model, first, tokens, noise, num_steps=num_steps, guidance=guidance)
    assert (own - theirs).norm() <= 1e-4 * theirs.norm()


def test_without_guidance_the_pipeline_of_diffusers_gives_the_same_clip() -> None:
    """The pipeline's image embedding plays the part of a one-token text; frames a second are its argument minus 1."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    model, _, _, noise = case()
    sizes = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=768,
        image_size=32,
        patch_size=16,
    )
    pipeline = StableVideoDiffusionPipeline(
        vae=model.vae,
        image_encoder=CLIPVisionModelWithProjection(sizes).eval(),
        unet=model.unet,
        scheduler=EulerDiscreteScheduler.from_config(RELEASED_SCHEDULER),
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    embeddings = []
    pipeline.image_encoder.register_forward_hook(
        lambda _module, _inputs, output: embeddings.append(output.image_embeds[:, None])
    )
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {
        "height": 32,
        "width": 32,
        "num_frames": 4,
        "num_inference_steps": 3,
        "fps": 8,
        "noise_aug_strength": 0.0,
    }
    theirs = pipeline(
        picture, latents=noise[:1], min_guidance_scale=1.0, max_guidance_scale=1.0, output_type="latent", **options
    ).frames
    model.config = model.config.model_copy(update={"sample_condition_noise_id": 0.0})
    own = model.sample(2 * picture - 1, embeddings[0], num_steps=3, guidance=(1.0, 1.0), unit_noise=noise[:1])
    assert (own - theirs).norm() <= 1e-4 * theirs.norm()


def test_one_step_is_the_prediction_from_the_highest_noise_level() -> None:
    model, first, tokens, noise = case()
    condition = model.image_condition(first, strength=0.02)
    sigma = torch.full((2,), 700.0)
    with torch.no_grad():
        predicted = model.denoise(noise * 700.000714, tokens, sigma=sigma, condition=condition)
    own = model.sample(first, tokens, num_steps=1, guidance=(1.0, 1.0), unit_noise=noise)
    assert torch.allclose(own, predicted, atol=1e-5)


def test_skipping_the_unconditional_half_changes_nothing() -> None:
    model, first, tokens, noise = case()
    skipped = model.sample(first, tokens, num_steps=2, guidance=(1.0, 1.0), unit_noise=noise)
    computed = model.sample(first, tokens, num_steps=2, guidance=(1.0, 1.0 + 1e-7), unit_noise=noise)
    assert torch.allclose(skipped, computed, atol=1e-3)


def test_guidance_rises_from_the_first_frame_to_the_last() -> None:
    ramp = guidance_ramp((1.0, 3.0), 5, like=torch.zeros(1))
    assert ramp.shape == (1, 5, 1, 1, 1)
    assert ramp.flatten().tolist() == pytest.approx([1, 1.5, 2, 2.5, 3])


def test_equal_seeds_give_equal_clips() -> None:
    model, first, tokens, _ = case()

    def clip(seed: int) -> torch.Tensor:
        return model.sample(first, tokens, num_steps=1, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(clip(1), clip(1))
    assert not torch.equal(clip(1), clip(2))


def test_no_step_at_all_is_refused() -> None:
    model, first, tokens, noise = case()
    with pytest.raises(ConfigError, match="0 sampling steps"):
        model.sample(first, tokens, num_steps=0, unit_noise=noise)


def test_stopping_early_leaves_the_latents_of_that_step() -> None:
    model, first, tokens, noise = case()
    condition = model.image_condition(first)
    options = {"num_steps": 4, "guidance": (1.0, 1.0), "fps": 7}
    start = euler_sample(model, noise, tokens, condition, stop_after=0, **options)
    assert torch.allclose(start, noise * 700.000714)


def test_the_written_schedule_is_the_released_one() -> None:
    assert all(RELEASED_SCHEDULER[key] == value for key, value in SCHEDULER.items())
