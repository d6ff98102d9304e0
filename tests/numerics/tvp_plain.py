"""The training losses of text-guided video prediction written out clip by clip, from the papers' equations.

Independent of training/models/tvp: only diffusers' two networks are shared.
"""

from __future__ import annotations

import math

import torch


def edm_loss(
    unet, latents_TChw, first_raw_Chw, text_LD, *, sigma: float, noise, fps: int, bucket: int, strength: float
):
    """Squared error of the clean latents, weighted with 1/c_out² of EDM for a data deviation of 1."""
    data = 1.0
    skip = data**2 / (sigma**2 + data**2)
    out = -sigma * data / math.sqrt(sigma**2 + data**2)
    scale_in = 1 / math.sqrt(sigma**2 + data**2)
    time = 0.25 * math.log(sigma)
    noisy = latents_TChw + sigma * noise
    frames = [torch.cat([scale_in * frame, first_raw_Chw], dim=0) for frame in noisy]
    answer = unet(
        torch.stack(frames)[None],
        torch.tensor([time], dtype=latents_TChw.dtype),
        text_LD[None],
        torch.tensor([[fps, bucket, strength]], dtype=latents_TChw.dtype),
    ).sample[0]
    clean = out * answer + skip * noisy
    return ((clean - latents_TChw) ** 2 / out**2).mean()


def latent_path_loss(unet, latents, text, *, keep_uniform, sigma_normal, noise, factor: float):
    """Mean over clips; the condition is the first latent without its factor, strength 0; 5 % of texts are zeros."""
    losses = []
    for clip in range(len(latents)):
        words = text[clip] if float(keep_uniform[clip]) > 0.05 else text[clip] * 0
        sigma = math.exp(0.7 + 1.6 * float(sigma_normal.reshape(-1)[clip]))
        first = latents[clip, 0] / factor
        losses.append(
            edm_loss(unet, latents[clip], first, words, sigma=sigma, noise=noise[clip], fps=7, bucket=127, strength=0.0)
        )
    return sum(losses) / len(losses)


def pixel_path_loss(
    unet, vae, pixels, text, *, keep_uniform, sigma_normal, noise, image_normal, image_noise, factor: float
):
    """As above, from pictures: noise of log-normal strength on the first picture, which is encoded after it."""
    losses = []
    for clip in range(len(pixels)):
        words = text[clip] if float(keep_uniform[clip]) > 0.05 else text[clip] * 0
        sigma = math.exp(0.7 + 1.6 * float(sigma_normal.reshape(-1)[clip]))
        strength = math.exp(-3.0 + 0.5 * float(image_normal.reshape(-1)[clip]))
        noisy_picture = pixels[clip, 0] + strength * image_noise[clip].reshape(pixels[clip, 0].shape)
        with torch.no_grad():
            target = torch.stack([vae.encode(frame[None]).latent_dist.mode()[0] for frame in pixels[clip]]) * factor
            first = vae.encode(noisy_picture[None]).latent_dist.mode()[0]
        losses.append(
            edm_loss(unet, target, first, words, sigma=sigma, noise=noise[clip], fps=7, bucket=127, strength=strength)
        )
    return sum(losses) / len(losses)
