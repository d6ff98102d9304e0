"""The files of an export: what training leaves for evaluation, the model registry and other people.

A folder or `s3://` prefix with `model.safetensors`, `config.json`, `preprocessing.json`, `README.md` and, written last,
`export.json` = {id, digest, kind, inputs}. The digest is the sha256 of the weights file, whose header holds the hash of
the two config files: one hash covers everything that decides an output. No pickle is ever read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict

from infra.config import Config
from infra.digests import sha256_bytes, sha256_json
from infra.errors import InputError
from infra.storage import exists, join, read_bytes, read_json, remove, write_bytes, write_json
from training.models.common.images import Preprocessing

log = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
PREPROCESSING_NAME = "preprocessing.json"
CARD_NAME = "README.md"
RECORD_NAME = "export.json"
HEADER_KEY = "config_sha256"

KINDS = (
    "vit-encoder", "rsp", "video-vae", "tvp",
    "bc-policy", "vpp-policy", "diffusion-policy", "unipi-policy", "susie-policy",
)  # fmt: skip
ENCODER_LOADING = (
    "Use `training.export.load_encoder(folder)` or `load_policy(folder)`. The weights are plain safetensors; the\n"
    "encoder's names (`cls_token`, `pos_embed`, `patch_embed`, `blocks`, `norm`) are timm's."
)


class ModelReference(BaseModel):
    """A frozen model that an export needs and does not hold: where it was, and the digest that it must have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    digest: str


@dataclass(frozen=True)
class Export:
    """A read and verified export; `weights` on the CPU, exactly as saved."""

    url: str
    kind: str
    digest: str
    inputs: tuple[str, ...]
    model_config: dict[str, Any]
    preprocessing: Preprocessing
    weights: dict[str, torch.Tensor]


def save_export(
    folder: str | Path,
    *,
    kind: str,
    model_config: Config | Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    preprocessing: Preprocessing,
    card: str,
    inputs: Sequence[str],
) -> str:
    """Write an export and return its digest. `inputs` are the digests it was made from: data set, encoder, parent run.

    Equal arguments give equal bytes. Until the record is there the export does not exist for readers.
    """
    if kind not in KINDS:
        raise InputError(f"unknown export kind {kind!r}.", remedy=f"Known kinds: {', '.join(KINDS)}.")
    model = model_config.to_json() if isinstance(model_config, Config) else dict(model_config)
    config = {"kind": kind, "model": model}
    header = {HEADER_KEY: _config_hash(config, preprocessing)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    data = safetensors.torch.save(tensors, metadata=header)
    digest = sha256_bytes(data)

    remove(join(folder, RECORD_NAME))  # an older record must not vouch for a half-replaced folder
    write_bytes(join(folder, WEIGHTS_NAME), data)
    write_json(join(folder, CONFIG_NAME), config)
    write_json(join(folder, PREPROCESSING_NAME), preprocessing.to_json())
    write_bytes(join(folder, CARD_NAME), card.encode())
    record = {"id": digest, "digest": digest, "kind": kind, "inputs": list(inputs)}
    write_json(join(folder, RECORD_NAME), record)
    log.info("exported %s %s to %s (%d bytes)", kind, digest[:12], folder, len(data))
    return digest


def model_card(
    title: str, *, summary: str, facts: Mapping[str, object], limits: str, loading: str = ENCODER_LOADING
) -> str:
    """The text of `README.md`: what it is, a table of facts, how to load it, what it is not good for."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"# {title}\n\n{summary}\n\n| fact | value |\n| --- | --- |\n{rows}\n\n## Loading\n\n"
        f"{loading}\n\n## Limits\n\n{limits}\n"
    )


def is_complete(url: str | Path) -> bool:
    """Whether the record, written last, is there."""
    return exists(join(url, RECORD_NAME))


def read_record(url: str | Path) -> dict[str, Any]:
    """`export.json`; `InputError` when the export is missing or unfinished."""
    if not is_complete(url):
        raise InputError(f"{url} holds no finished export: {RECORD_NAME} is missing.", remedy="Run the training again.")
    record = read_json(join(url, RECORD_NAME))
    if not isinstance(record, dict) or not isinstance(record.get("digest"), str):
        raise InputError(f"{join(url, RECORD_NAME)} is no export record.", remedy="Export the model again.")
    return record


def read_export(url: str | Path) -> Export:
    """Read and verify everything; `InputError` names the file that is missing, damaged or of another export."""
    record = read_record(url)
    kind, model_config, preprocessing = read_config(url)
    path = join(url, WEIGHTS_NAME)
    data = read_bytes(path)
    digest = sha256_bytes(data)
    if digest != record["digest"]:
        raise InputError(
            f"{path} has sha256 {digest[:12]} where {RECORD_NAME} says {record['digest'][:12]}.",
            remedy="The file was changed or belongs to another export; export again.",
        )
    header, weights = _parse_weights(data, path)
    if header.get(HEADER_KEY) != _config_hash({"kind": kind, "model": model_config}, preprocessing):
        raise InputError(
            f"{join(url, CONFIG_NAME)} or {PREPROCESSING_NAME} was changed after the weights were saved.",
            remedy="Restore the files or export again.",
        )
    inputs = tuple(str(item) for item in record.get("inputs", ()))
    return Export(str(url), kind, digest, inputs, model_config, preprocessing, weights)


def _config_hash(config: Mapping[str, Any], preprocessing: Preprocessing) -> str:
    return sha256_json({"config": config, "preprocessing": preprocessing.to_json()})


def read_config(url: str | Path) -> tuple[str, dict[str, Any], Preprocessing]:
    """(kind, model config, preprocessing) as stored, without looking at the weights."""
    config = read_json(join(url, CONFIG_NAME))
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict) or "kind" not in config:
        raise InputError(f"{join(url, CONFIG_NAME)} has no kind and model.", remedy="Export the model again.")
    preprocessing = read_json(join(url, PREPROCESSING_NAME))
    if not isinstance(preprocessing, dict):
        raise InputError(f"{join(url, PREPROCESSING_NAME)} is no JSON object.", remedy="Export the model again.")
    return str(config["kind"]), config["model"], Preprocessing.parse(preprocessing)


def _parse_weights(data: bytes, path: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        weights = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is no safetensors file: {error}.", remedy="Pickled weights are refused.") from None
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return header, weights
