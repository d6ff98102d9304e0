"""Where a policy's features come from: one config a kind, and the frozen model it builds.

A provider's digest covers its weights and every setting that decides the features; an export names both, so that a
policy never acts on features it was not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from infra.config import Config
from infra.digests import sha256_file, sha256_json, short
from infra.errors import ConfigError, InputError
from training.export_files import ModelReference
from training.models.common.plain_features import EncoderFeatures, StillFeature
from training.models.tvp.provider import VideoFeatures, VideoTapConfig, tap_digest
from training.protocols import FeatureProvider

Cameras = Annotated[tuple[str, ...], Field(min_length=1)]


class VideoProviderConfig(VideoTapConfig):
    """A video model: its export or a diffusers folder. `random_seed` draws its UNet anew: a control arm."""

    kind: Literal["tvp"] = "tvp"
    url: str = Field(min_length=1)
    random_seed: int | None = Field(default=None, ge=0)


class EncoderProviderConfig(Config):
    """An encoder's export: RSP, a masked autoencoder. `random_seed` draws its weights anew: a control arm."""

    kind: Literal["encoder"] = "encoder"
    url: str = Field(min_length=1)
    cameras: Cameras = ("main",)
    feature: StillFeature = "patch_tokens"
    random_seed: int | None = Field(default=None, ge=0)


class TimmProviderConfig(Config):
    """Any timm model with weights from a file; `match` "order" for files whose names differ but not their order."""

    kind: Literal["timm"] = "timm"
    model: str = Field(min_length=1)
    weights: str = Field(min_length=1)
    match: Literal["names", "order"] = "names"
    cameras: Cameras = ("main",)
    feature: StillFeature = "patch_tokens"


class VAEProviderConfig(Config):
    """The latents of a video model's autoencoder as tokens (the paper's Stable-VAE); `pool` averages squares."""

    kind: Literal["vae"] = "vae"
    url: str = Field(min_length=1)
    cameras: Cameras = ("main",)
    pool: int = Field(default=1, ge=1)


class VoltronProviderConfig(Config):
    """Voltron's encoder from the user's weights; `language` is a DistilBERT folder, empty for pictures alone."""

    kind: Literal["voltron"] = "voltron"
    path: str = Field(min_length=1)
    language: str = ""
    cameras: Cameras = ("main",)


FeatureProviderConfig = Annotated[
    VideoProviderConfig | EncoderProviderConfig | TimmProviderConfig | VAEProviderConfig | VoltronProviderConfig,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[Config]] = {
    "tvp": VideoProviderConfig,
    "encoder": EncoderProviderConfig,
    "timm": TimmProviderConfig,
    "vae": VAEProviderConfig,
    "voltron": VoltronProviderConfig,
}


def parse_provider(value: dict[str, Any]) -> Any:
    """A provider's config from plain values; `ConfigError` for an unknown kind or key."""
    kind = str(value.get("kind"))
    if kind not in KINDS:
        raise ConfigError(f"unknown kind of features {kind!r}.", remedy=f"Known: {', '.join(KINDS)}.")
    return KINDS[kind].parse(value)


def build_provider(config: Any, *, device: str | torch.device = "cpu") -> FeatureProvider:
    """The frozen model of a config, ready to be asked. Raises what loading its weights raises."""
    return _BUILDERS[config.kind](config, torch.device(device))


def references(config: Any) -> tuple[ModelReference, ...]:
    """The weights that a config needs, by digest, without loading any."""
    return (ModelReference(url=_place(config), digest=_weights_digest(config)),)


def provider_digest(config: Any) -> str:
    """The digest that `build_provider(config).digest` will have; a video model is not loaded for it."""
    if config.kind == "tvp":
        return tap_digest(_conditioned_digest(config), config)
    return build_provider(config).digest


def check_references(config: Any, wanted: Sequence[ModelReference]) -> None:
    """`InputError` unless the weights that `config` names are those that a stored policy was trained on."""
    for found, reference in zip(references(config), wanted, strict=True):
        if found.digest != reference.digest:
            raise InputError(
                f"{found.url} holds {short(found.digest)}, the policy was trained on {short(reference.digest)}.",
                remedy="Name the model it was trained on.",
            )


def with_url(config: Any, url: str) -> Any:
    """The same features from weights that have moved."""
    field = {"timm": "weights", "voltron": "path"}.get(config.kind, "url")
    return config.model_copy(update={field: url})


def _place(config: Any) -> str:
    return str(getattr(config, {"timm": "weights", "voltron": "path"}.get(config.kind, "url")))


def _weights_digest(config: Any) -> str:
    from pathlib import Path

    from training.export_files import read_record
    from training.export_video import video_digest

    if config.kind in ("tvp", "vae"):
        return video_digest(config.url)
    if config.kind == "encoder":
        return str(read_record(config.url)["digest"])
    path = Path(_place(config))
    if not path.is_file():
        raise InputError(f"weights {path} do not exist.", remedy="Give the path of a weights file.")
    return sha256_file(path)


def _drawn(digest: str, seed: int | None) -> str:
    return digest if seed is None else sha256_json({"random": digest, "seed": seed})


def _conditioned_digest(config: VideoProviderConfig) -> str:
    """A video model together with the text encoder it names: both decide its features."""
    from training.export_video import video_config
    from training.models.common.text import TokenEncoder

    text = TokenEncoder(video_config(config.url).text).digest
    return sha256_json({"model": _drawn(_weights_digest(config), config.random_seed), "text": text})


def _video(config: VideoProviderConfig, device: torch.device) -> FeatureProvider:
    from training.export_video import FrozenVideoModel, load_video_weights
    from training.models.tvp.model import random_unet

    model = load_video_weights(config.url)
    if config.random_seed is not None:
        sizes = model.true_config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.random_seed)
            fresh = random_unet(sizes.unet, sizes.vae.latent_channels, sizes.num_frames)
        model.unet.load_state_dict(fresh.state_dict())
    return VideoFeatures(FrozenVideoModel(model, digest=_conditioned_digest(config)).to(device), config)


def _encoder(config: EncoderProviderConfig, device: torch.device) -> FeatureProvider:
    from training.export import load_encoder, random_encoder

    found = (
        load_encoder(config.url) if config.random_seed is None else random_encoder(config.url, seed=config.random_seed)
    )
    return EncoderFeatures(found.to(device), cameras=config.cameras, feature=config.feature)


def _timm(config: TimmProviderConfig, device: torch.device) -> FeatureProvider:
    from training.models.common.foreign_encoders import TimmEncoder

    encoder = TimmEncoder(config.model, config.weights, match=config.match)
    return EncoderFeatures(encoder.to(device), cameras=config.cameras, feature=config.feature)


def _vae(config: VAEProviderConfig, device: torch.device) -> FeatureProvider:
    from training.export_video import load_vae
    from training.models.tvp.provider import VAEFeatures

    return VAEFeatures(load_vae(config.url).to(device), cameras=config.cameras, pool=config.pool)


def _voltron(config: VoltronProviderConfig, device: torch.device) -> FeatureProvider:
    from training.models.common.foreign_encoders import VoltronEncoder, VoltronFeatures

    encoder = VoltronEncoder(config.path, language=config.language)
    return VoltronFeatures(encoder.to(device), cameras=config.cameras)


_BUILDERS: dict[str, Any] = {"tvp": _video, "encoder": _encoder, "timm": _timm, "vae": _vae, "voltron": _voltron}
