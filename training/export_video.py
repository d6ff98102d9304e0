"""Exports of video models: autoencoders (`video-vae`) and whole text-guided predictors (`tvp`).

Where an export's url is wanted, a local folder in Stable Video Diffusion's layout does as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from infra.errors import InputError
from infra.storage import exists, join, read_json
from training.export_files import read_config, read_export, read_record, save_export
from training.models.common.images import Preprocessing
from training.models.common.weights import load_weights
from training.models.tvp.autoencoder import FrozenVAE, random_autoencoder
from training.models.tvp.config import TVPConfig, VAEConfig
from training.models.tvp.model import TextGuidedVideoModel, random_unet
from training.models.tvp.official import (
    OWN_NAME,
    diffusers_digest,
    is_diffusers_folder,
    load_diffusers,
    load_diffusers_vae,
)
from training.models.tvp.predictor import FrozenVideoModel

__all__ = [
    "FrozenVAE",
    "FrozenVideoModel",
    "load_vae",
    "load_video_model",
    "load_video_weights",
    "save_vae_export",
    "save_video_export",
    "video_config",
    "video_digest",
]

VAE_KIND, MODEL_KIND = "video-vae", "tvp"
VIDEO_LOADING = (
    "Use `training.export.load_video_model(folder)`, or `load_vae(folder)` for the autoencoder alone. The weights are\n"
    "plain safetensors under diffusers' names (`unet.*` UNetSpatioTemporalConditionModel, `vae.*`\n"
    "AutoencoderKLTemporalDecoder); `foreframe finetune convert` writes the folder layout that diffusers reads."
)


def save_vae_export(
    folder: str | Path, vae: Any, config: VAEConfig, *, image_size: int, card: str, inputs: Sequence[str]
) -> str:
    """Write an autoencoder's export and return its digest; the config's scaling factor is what users will apply."""
    return save_export(
        folder, kind=VAE_KIND, model_config=config, weights=vae.state_dict(),
        preprocessing=video_preprocessing(image_size), card=card, inputs=inputs,
    )  # fmt: skip


def save_video_export(
    folder: str | Path,
    model: TextGuidedVideoModel,
    *,
    card: str,
    inputs: Sequence[str],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """Write a model's export and return its digest; `weights` (`unet.*`, `vae.*`) replace the model's own."""
    return save_export(
        folder, kind=MODEL_KIND, model_config=model.true_config(), weights=weights or model.state_dict(),
        preprocessing=video_preprocessing(model.config.image_size), card=card, inputs=inputs,
    )  # fmt: skip


def video_preprocessing(image_size: int) -> Preprocessing:
    """Pixels in [-1, 1], squashed to a square without antialiasing."""
    half = (0.5, 0.5, 0.5)
    return Preprocessing(image_size=image_size, mean=half, std=half, interpolation="bilinear", antialias=False)


def load_vae(url: str | Path) -> FrozenVAE:
    """The autoencoder of a `video-vae` or `tvp` export or of a diffusers folder."""
    if is_diffusers_folder(url):
        vae, config = load_diffusers_vae(url)
        return FrozenVAE(vae, config, image_size=config.sample_size)
    export = read_export(url)
    if export.kind not in (VAE_KIND, MODEL_KIND):
        raise InputError(f"{url} is a {export.kind!r} export.", remedy="Give the export of a fit-vae run.")
    found = export.model_config if export.kind == VAE_KIND else export.model_config["vae"]
    config = VAEConfig.parse(found)
    weights = export.weights if export.kind == VAE_KIND else _below("vae.", export.weights)
    return FrozenVAE(_filled_vae(config, weights), config, image_size=export.preprocessing.image_size)


def load_video_weights(url: str | Path) -> TextGuidedVideoModel:
    """The model of a `tvp` export or of a diffusers folder, ready to be trained on."""
    if is_diffusers_folder(url):
        return load_diffusers(url)
    export = read_export(url)
    if export.kind != MODEL_KIND:
        raise InputError(f"{url} is a {export.kind!r} export.", remedy="Give the export of a finetune-tvp run.")
    config = TVPConfig.parse(export.model_config)
    with torch.device("meta"):
        unet = random_unet(config.unet, config.vae.latent_channels, config.num_frames)
    load_weights(unet, _below("unet.", export.weights), assign=True)
    return TextGuidedVideoModel(config, unet, _filled_vae(config.vae, _below("vae.", export.weights)))


def load_video_model(url: str | Path, *, autocast: bool = False) -> FrozenVideoModel:
    """The frozen predictor of a `tvp` export or of a diffusers folder; `autocast` runs the UNet in bfloat16."""
    return FrozenVideoModel(load_video_weights(url), digest=video_digest(url), autocast=autocast)


def video_digest(url: str | Path) -> str:
    """What names a model in records: the export's digest, or one over a diffusers folder's files."""
    return diffusers_digest(url) if is_diffusers_folder(url) else str(read_record(url)["digest"])


def video_config(url: str | Path) -> TVPConfig:
    """Sizes and text encoder of a video model, without reading its weights; `InputError` for another kind of export."""
    if is_diffusers_folder(url):
        place = join(url, OWN_NAME)
        return TVPConfig.parse(read_json(place) if exists(place) else {})
    kind, own, _ = read_config(url)
    if kind != MODEL_KIND:
        raise InputError(f"{url} is a {kind!r} export.", remedy="Give the export of a finetune-tvp run.")
    return TVPConfig.parse(own)


def _filled_vae(config: VAEConfig, weights: Mapping[str, torch.Tensor]) -> Any:
    with torch.device("meta"):
        vae = random_autoencoder(config)
    load_weights(vae, weights, assign=True)
    return vae


def _below(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
