"""Exports: one place to load whatever training left, from a folder or an `s3://` prefix. No pickle is ever read.

`export_files.py` holds the format, `export_video.py` the loaders of video models; both are re-exported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from infra.errors import InputError
from training.export_files import (
    CARD_NAME,
    CONFIG_NAME,
    PREPROCESSING_NAME,
    RECORD_NAME,
    WEIGHTS_NAME,
    Export,
    is_complete,
    model_card,
    read_config,
    read_export,
    read_record,
    save_export,
)
from training.export_video import (
    FrozenVAE,
    FrozenVideoModel,
    load_vae,
    load_video_model,
    load_video_weights,
    save_vae_export,
    save_video_export,
    video_digest,
)
from training.models.common.frozen import FrozenEncoder, RawPatches
from training.models.common.images import Preprocessing
from training.models.common.vit import ENCODER_PREFIXES, EncoderConfig
from training.models.common.weights import load_weights
from training.models.policies import BehaviourCloningHead, BehaviourCloningPolicy, BehaviourCloningPolicyConfig
from training.models.rsp import RSP, RSPConfig

__all__ = [
    "CARD_NAME", "CONFIG_NAME", "ENCODER_KINDS", "POLICY_KINDS", "PREPROCESSING_NAME", "RECORD_NAME", "WEIGHTS_NAME",
    "Export", "FrozenVAE", "FrozenVideoModel", "is_complete", "load_encoder", "load_policy", "load_rsp", "load_vae",
    "load_video_model", "load_video_weights", "model_card",
    "random_encoder", "raw_patches", "read_export", "read_record", "save_export",
    "save_vae_export", "save_video_export", "video_digest",
]  # fmt: skip

# kind -> the config class of its encoder; an RSP export holds an encoder under the same weight names.
ENCODER_KINDS: dict[str, type[EncoderConfig]] = {"vit-encoder": EncoderConfig, "rsp": RSPConfig}
POLICY_KINDS: dict[str, type[BehaviourCloningPolicyConfig]] = {"bc-policy": BehaviourCloningPolicyConfig}


def load_encoder(url: str | Path, *, autocast: bool = False) -> FrozenEncoder:
    """The frozen encoder of an export; `autocast` computes in bfloat16."""
    export = read_export(url)
    config = _encoder_config(export.kind, export.model_config, url)
    weights = {name: value for name, value in export.weights.items() if name.startswith(ENCODER_PREFIXES)}
    return _frozen(config, weights, export.preprocessing, export.digest, autocast=autocast)


def load_rsp(url: str | Path) -> RSP:
    """The whole RSP model in eval mode, e.g. to draw predicted futures."""
    export = read_export(url)
    if export.kind != "rsp":
        raise InputError(f"{url} is a {export.kind!r} export.", remedy="Give the export of a pretrain-rsp run.")
    model = RSP(RSPConfig.parse(export.model_config))
    load_weights(model, export.weights)
    return model.eval()


def load_policy(url: str | Path, *, autocast: bool = False) -> BehaviourCloningPolicy:
    """The policy of an export, with its own encoder inside."""
    export = read_export(url)
    if export.kind not in POLICY_KINDS:
        raise InputError(f"{url} is a {export.kind!r} export, not a policy.", remedy="Give a train-policy export.")
    config = POLICY_KINDS[export.kind].parse(export.model_config)
    head = BehaviourCloningHead(config.head)
    load_weights(head, _below("head.", export.weights))
    encoder = None
    if config.encoder is not None:
        weights = _below("encoder.", export.weights)
        encoder = _frozen(config.encoder, weights, export.preprocessing, config.encoder_digest, autocast=autocast)
    return BehaviourCloningPolicy(head, encoder=encoder, camera=config.camera, digest=export.digest)


def random_encoder(like: str | Path | EncoderConfig, *, seed: int) -> FrozenEncoder:
    """An encoder of the same sizes (of an export or a config) with freshly drawn weights: a control arm."""
    if isinstance(like, EncoderConfig):
        config, preprocessing = like, Preprocessing(image_size=like.image_size)
    else:
        read_record(like)
        kind, model_config, preprocessing = read_config(like)
        config = _encoder_config(kind, model_config, like)
    return FrozenEncoder.random(_plain(config), preprocessing, seed=seed)


def raw_patches(patch_size: int, *, image_size: int = 224) -> RawPatches:
    """Colour values as features: a control arm."""
    return RawPatches(patch_size, image_size=image_size)


def _encoder_config(kind: str, model_config: dict[str, Any], url: str | Path) -> EncoderConfig:
    if kind not in ENCODER_KINDS:
        raise InputError(f"{url} is a {kind!r} export, not an encoder.", remedy=f"Kinds: {', '.join(ENCODER_KINDS)}.")
    return ENCODER_KINDS[kind].parse(model_config)


def _plain(config: EncoderConfig) -> EncoderConfig:
    """Only the encoder's fields, so that a digest or a policy's config does not carry the pre-training's."""
    return EncoderConfig(**{name: getattr(config, name) for name in EncoderConfig.model_fields})


def _frozen(
    config: EncoderConfig, weights: dict[str, torch.Tensor], how: Preprocessing, digest: str, *, autocast: bool
) -> FrozenEncoder:
    encoder = FrozenEncoder(_plain(config), preprocessing=how, digest=digest, autocast=autocast)
    load_weights(encoder.model, weights)
    return encoder


def _below(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
