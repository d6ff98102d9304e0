"""The stochastic latent: draws, straight-through samples, balanced KL (RSP 2024, sections 3.1 and 4.1).

Everything here computes in at least float32: in half precision an underflown prior probability makes the KL infinite.
Shape letters: B batch, V variables, K classes, Z flattened sample.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from training.models.rsp.config import RSPConfig

DEVIATION_FLOOR = 0.1  # DreamerV2's; the official Gaussian branch does not run, so there is nothing to follow


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """float32, or float64 when the model computes in it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def draw_sample(logits: torch.Tensor, config: RSPConfig, generator: torch.Generator | None) -> torch.Tensor:
    """The random part of a sample: one-hot (B, V, K) of the categorical, unit normal (B, V) of the Gaussian."""
    if config.latent == "gaussian":
        shape = (logits.shape[0], config.num_latents)
        return torch.randn(shape, generator=generator, device=logits.device, dtype=logits.dtype)
    probabilities = _classes(logits.detach(), config).softmax(dim=-1)
    drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
    return F.one_hot(drawn.view(probabilities.shape[:2]), config.num_classes).to(logits.dtype)


def reparameterise(logits: torch.Tensor, sample: torch.Tensor, config: RSPConfig) -> torch.Tensor:
    """(B, Z) with the logits' gradient: straight-through for one-hot, mean + deviation * unit for the Gaussian.

    A categorical sample may be given as uniform numbers (B, V): a draw that does not depend on the rest of the batch.
    """
    if config.latent == "gaussian":
        mean, deviation = _moments(logits)
        return mean + deviation * sample
    probabilities = _classes(logits, config).softmax(dim=-1)
    if sample.ndim == 2:
        sample = _class_of(sample, probabilities.detach())
    return (sample.to(probabilities.dtype) + (probabilities - probabilities.detach())).flatten(1)


def balanced_kl(posterior: torch.Tensor, prior: torch.Tensor, config: RSPConfig) -> torch.Tensor:
    """(B,) in nats, summed over variables: a * KL(sg(posterior) || prior) + (1 - a) * KL(posterior || sg(prior))."""
    divergence = _gaussian_kl if config.latent == "gaussian" else _categorical_kl
    trains_prior = divergence(posterior.detach(), prior, config)
    trains_posterior = divergence(posterior, prior.detach(), config)
    return config.kl_balance * trains_prior + (1 - config.kl_balance) * trains_posterior


def clip_kl(kl_B: torch.Tensor, config: RSPConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch mean, the same with free bits): below the floor the gradient is zero.

    The mean is over this process's samples, as in the official code; a mean over all ranks belongs here.
    """
    mean = kl_B.mean()
    return mean, mean.clamp(min=config.free_bits)


def _classes(logits: torch.Tensor, config: RSPConfig) -> torch.Tensor:
    return logits.view(-1, config.num_latents, config.num_classes)


def _class_of(uniform_BV: torch.Tensor, probabilities_BVK: torch.Tensor) -> torch.Tensor:
    """One-hot (B, V, K) by inverse cumulative probability."""
    bounds = probabilities_BVK.cumsum(dim=-1)[..., :-1]
    return F.one_hot((uniform_BV[..., None] >= bounds).sum(dim=-1), probabilities_BVK.shape[-1])


def _categorical_kl(posterior: torch.Tensor, prior: torch.Tensor, config: RSPConfig) -> torch.Tensor:
    log_posterior = _classes(posterior, config).log_softmax(dim=-1)
    log_prior = _classes(prior, config).log_softmax(dim=-1)
    return (log_posterior.exp() * (log_posterior - log_prior)).sum(dim=(1, 2))


def _moments(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, raw = logits.chunk(2, dim=-1)
    return mean, F.softplus(raw) + DEVIATION_FLOOR


def _gaussian_kl(posterior: torch.Tensor, prior: torch.Tensor, _: RSPConfig) -> torch.Tensor:
    (mean_q, deviation_q), (mean_p, deviation_p) = _moments(posterior), _moments(prior)
    squares = (deviation_q**2 + (mean_q - mean_p) ** 2) / (2 * deviation_p**2)
    return (deviation_p.log() - deviation_q.log() + squares - 0.5).sum(dim=-1)
