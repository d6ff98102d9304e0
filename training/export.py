"""Exports: one place to load whatever training left, from a folder or an `s3://` prefix. No pickle is ever read.

`export_files.py` holds the format, `export_video.py` the loaders of video models, `export_policies.py` those of
policies; all are re-exported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from training.export_policies import POLICY_KINDS, load_policy
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
from training.models.common.frozen import FrozenEncoder, RawPatches, plain_config
from training.models.common.images import Preprocessing
from training.models.common.vit import ENCODER_PREFIXES, EncoderConfig
from training.models.common.weights import load_weights
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


def load_encoder(url: str | Path, *, autocast: bool = False) -> FrozenEncoder:
    """The frozen encoder of an export; `autocast` computes in bfloat16."""
    export = read_export(url)
    config = _encoder_config(export.kind, export.model_config, url)
    weights = {name: value for name, value in export.weights.items() if name.startswith(ENCODER_PREFIXES)}
    return FrozenEncoder.stored(config, weights, export.preprocessing, export.digest, autocast=autocast)


def load_rsp(url: str | Path) -> RSP:
    """The whole RSP model in eval mode, e.g. to draw predicted futures."""
    export = read_export(url)
    if export.kind != "rsp":
        raise InputError(f"{url} is a {export.kind!r} export.", remedy="Give the export of a pretrain-rsp run.")
    model = RSP(RSPConfig.parse(export.model_config))
    load_weights(model, export.weights)
    return model.eval()


def random_encoder(like: str | Path | EncoderConfig, *, seed: int) -> FrozenEncoder:
    """An encoder of the same sizes (of an export or a config) with freshly drawn weights: a control arm."""
    if isinstance(like, EncoderConfig):
        config, preprocessing = like, Preprocessing(image_size=like.image_size)
    else:
        read_record(like)
        kind, model_config, preprocessing = read_config(like)
        config = _encoder_config(kind, model_config, like)
    return FrozenEncoder.random(plain_config(config), preprocessing, seed=seed)


def raw_patches(patch_size: int, *, image_size: int = 224) -> RawPatches:
    """Colour values as features: a control arm."""
    return RawPatches(patch_size, image_size=image_size)


def _encoder_config(kind: str, model_config: dict[str, Any], url: str | Path) -> EncoderConfig:
    if kind not in ENCODER_KINDS:
        raise InputError(f"{url} is a {kind!r} export, not an encoder.", remedy=f"Kinds: {', '.join(ENCODER_KINDS)}.")
    return ENCODER_KINDS[kind].parse(model_config)
