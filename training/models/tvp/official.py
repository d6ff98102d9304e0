"""Stable Video Diffusion's folder layout: reading the releases (svd, svd-robot, svd-robot-calvin) and writing our own.

Only safetensors are read. The position-code flag, the text encoder and our sizes lie beside `model_index.json` in
`foreframe.json`: nothing in the layout itself has a place for them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from infra.digests import pretty_json, sha256_file, sha256_json
from infra.errors import ConfigError, InputError
from infra.storage import local_path, read_json
from training.models.common.text import TextEncoderConfig
from training.models.common.weights import load_weights
from training.models.tvp.autoencoder import random_autoencoder
from training.models.tvp.config import TVPConfig, UNetConfig, VAEConfig
from training.models.tvp.model import TextGuidedVideoModel, random_unet
from training.models.tvp.schedule import SIGMA_MAX, SIGMA_MIN

INDEX_NAME = "model_index.json"
OWN_NAME = "foreframe.json"
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
UNUSED_PARTS = ("image_encoder", "feature_extractor")  # in the releases; text replaces them
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX,
    "steps_offset": 1, "timestep_spacing": "leading", "timestep_type": "continuous", "use_karras_sigmas": True,
}  # fmt: skip
CHECKED_SCHEDULER_KEYS = ("prediction_type", "sigma_min", "sigma_max", "timestep_type", "use_karras_sigmas")


def is_diffusers_folder(url: str | Path) -> bool:
    """Whether a local folder has the layout's index."""
    return "://" not in str(url) and (Path(url) / INDEX_NAME).is_file()


def load_diffusers(
    folder: str | Path,
    *,
    position_code: bool | None = None,
    text: TextEncoderConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> TextGuidedVideoModel:
    """The model of a folder, weights as `dtype`; arguments win over the folder's `foreframe.json`.

    `ConfigError` when neither says whether the position code belongs to the weights; `InputError`, one line, for a
    missing file, pickled weights, missing or misshapen weights, or another architecture.
    """
    root = _require_layout(folder)
    config = _own_config(root, position_code=position_code, text=text)
    _check_scheduler(root)
    unet_config, vae_config = read_unet_config(root), read_vae_config(root)
    with torch.device("meta"):
        unet = random_unet(unet_config, vae_config.latent_channels, config.num_frames)
    _fill(unet, root / "unet", dtype)
    vae = _read_vae(root, vae_config, dtype)
    return TextGuidedVideoModel(config.model_copy(update={"unet": unet_config, "vae": vae_config}), unet, vae)


def load_diffusers_vae(folder: str | Path) -> tuple[Any, VAEConfig]:
    """Only the autoencoder of a folder, float32."""
    root = _require_layout(folder)
    config = read_vae_config(root)
    return _read_vae(root, config, torch.float32), config


def save_diffusers(folder: str | Path, model: TextGuidedVideoModel, *, parts_from: str | Path | None = None) -> None:
    """Write a folder that diffusers itself reads, `model_index.json` last.

    `parts_from` is a folder of the same layout whose image encoder and feature extractor are copied along: the
    original pipeline wants them although text replaces them. Without it the index says that they are absent.
    """
    from diffusers import EulerDiscreteScheduler
    from diffusers import __version__ as diffusers_version

    root = local_path(folder)
    root.mkdir(parents=True, exist_ok=True)
    (root / INDEX_NAME).unlink(missing_ok=True)
    model.unet.save_pretrained(str(root / "unet"), safe_serialization=True)
    model.vae.save_pretrained(str(root / "vae"), safe_serialization=True)
    EulerDiscreteScheduler(**SCHEDULER).save_pretrained(str(root / "scheduler"))
    index: dict[str, Any] = {
        "_class_name": "StableVideoDiffusionPipeline",
        "_diffusers_version": diffusers_version,
        **{part: [None, None] for part in UNUSED_PARTS},
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
        "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
    }
    index.update(_copy_parts(root, parts_from))
    own = {name: value for name, value in model.config.to_json().items() if name not in ("unet", "vae")}
    (root / OWN_NAME).write_bytes(pretty_json(own))
    (root / INDEX_NAME).write_bytes(pretty_json(index))


def diffusers_digest(folder: str | Path) -> str:
    """sha256 over the files of UNet, autoencoder and `foreframe.json`: what decides an output."""
    root = _require_layout(folder)
    files = [path for part in ("unet", "vae") for path in (root / part).iterdir() if _decides(path)]
    own = root / OWN_NAME
    found = sorted([*files, own] if own.is_file() else files)
    return sha256_json({str(path.relative_to(root)): sha256_file(path) for path in found})


def read_unet_config(root: Path) -> UNetConfig:
    """Sizes from `unet/config.json`; `InputError` for an architecture that is not Stable Video Diffusion's."""
    found = _read_config(root / "unet", "UNetSpatioTemporalConditionModel")
    attending = len(found.get("block_out_channels", ())) - 1
    expected = {
        "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * attending + ["DownBlockSpatioTemporal"],
        "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * attending,
        "transformer_layers_per_block": 1,
        "projection_class_embeddings_input_dim": 3 * found.get("addition_time_embed_dim", 0),
        "in_channels": 2 * found.get("out_channels", 0),
    }
    _require_equal(root / "unet", found, expected)
    return UNetConfig.parse({name: found[name] for name in UNetConfig.model_fields if name in found})


def read_vae_config(root: Path) -> VAEConfig:
    """Sizes from `vae/config.json`."""
    found = _read_config(root / "vae", "AutoencoderKLTemporalDecoder")
    levels = len(found.get("block_out_channels", ()))
    _require_equal(root / "vae", found, {"down_block_types": ["DownEncoderBlock2D"] * levels})
    return VAEConfig.parse({name: found[name] for name in VAEConfig.model_fields if name in found})


def _require_layout(folder: str | Path) -> Path:
    root = local_path(folder)
    wanted = (INDEX_NAME, "unet/config.json", "vae/config.json")
    if missing := [name for name in wanted if not (root / name).is_file()]:
        raise InputError(
            f"{folder} has not the layout of Stable Video Diffusion: {', '.join(missing)} missing.",
            remedy="Give the folder that holds model_index.json, unet and vae.",
        )
    return root


def _own_config(root: Path, *, position_code: bool | None, text: TextEncoderConfig | None) -> TVPConfig:
    stored = read_json(root / OWN_NAME) if (root / OWN_NAME).is_file() else {}
    if not isinstance(stored, dict) or {"unet", "vae"} & set(stored):
        raise InputError(f"{root / OWN_NAME} is no record of a video model.", remedy="Write it with save_diffusers.")
    given = {"position_code": position_code, "text": text.to_json() if text is not None else None}
    stored = {**stored, **{name: value for name, value in given.items() if value is not None}}
    if "position_code" not in stored:
        raise ConfigError(
            f"{root} does not say whether its weights were trained with a position code on the text.",
            remedy=f'Set position_code (svd-robot: true; svd-robot-calvin: false), or write {{"position_code": ...}} '
            f"to {OWN_NAME} there.",
        )
    return TVPConfig.parse(stored)


def _check_scheduler(root: Path) -> None:
    path = root / "scheduler" / "scheduler_config.json"
    if path.is_file():
        _require_equal(root / "scheduler", read_json(path), {key: SCHEDULER[key] for key in CHECKED_SCHEDULER_KEYS})


def _read_config(part: Path, class_name: str) -> dict[str, Any]:
    found = read_json(part / "config.json")
    if not isinstance(found, dict) or found.get("_class_name") != class_name:
        name = found.get("_class_name") if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{part} holds a {name} where a {class_name} is needed.", remedy="Give an SVD folder.")
    return found


def _require_equal(part: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if found.get(key, value) != value:
            raise InputError(
                f"{part} has {key} {found[key]!r} where {value!r} is needed.",
                remedy="Only the architecture and schedule of Stable Video Diffusion are supported.",
            )


def _read_vae(root: Path, config: VAEConfig, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        vae = random_autoencoder(config)
    _fill(vae, root / "vae", dtype)
    return vae


def _fill(module: nn.Module, part: Path, dtype: torch.dtype) -> None:
    weights: dict[str, torch.Tensor] = {}
    for path in _weight_files(part):
        try:
            weights.update(safetensors.torch.load_file(str(path)))
        except safetensors.SafetensorError as error:
            raise InputError(f"{path} is no safetensors file: {error}.", remedy="Fetch the file again.") from None
    try:
        load_weights(module, {name: value.to(dtype) for name, value in weights.items()}, assign=True)
    except InputError as error:
        raise InputError(f"{part}: {error.message}", remedy="The folder is incomplete or of another model.") from None


def _weight_files(part: Path) -> list[Path]:
    for name in WEIGHT_NAMES:
        if (part / name).is_file():
            return [part / name]
        index = part / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            if any(Path(item).name != item for item in names):
                raise InputError(f"{index} names files outside its folder.", remedy="Fetch the folder again.")
            if missing := [item for item in names if not (part / item).is_file()]:
                raise InputError(f"{part} lacks the weights {missing[0]}.", remedy="Fetch the folder again.")
            return [part / item for item in names]
    pickled = sorted(path.name for path in part.glob("*.bin"))
    if pickled:
        raise InputError(
            f"{part} has only pickled weights ({pickled[0]}), which are not read: they can run code.",
            remedy="Save the model as safetensors.",
        )
    raise InputError(f"{part} has no weights: {WEIGHT_NAMES[0]} is missing.", remedy="Fetch the folder again.")


def _copy_parts(root: Path, source: str | Path | None) -> dict[str, Any]:
    if source is None:
        return {}
    origin = _require_layout(source)
    index = json.loads((origin / INDEX_NAME).read_bytes())
    taken = {part: index[part] for part in UNUSED_PARTS if part in index and (origin / part).is_dir()}
    for part in taken:
        shutil.copytree(origin / part, root / part, dirs_exist_ok=True)
    return taken


def _decides(path: Path) -> bool:
    return path.suffix in (".json", ".safetensors")
