"""Weights of published metric networks, given by the user by path and read without running any of their code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from infra.digests import sha256_file
from infra.errors import InputError

OPTIONAL_SUFFIX = ".num_batches_tracked"  # a counter that no output depends on; old files lack it


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a `.safetensors` file or a plain `torch.save`d state dict.

    `InputError` for a missing file, for anything that is not tensors by name, and for TorchScript archives: those are
    programs, not weights.
    """
    place = Path(path)
    if not place.is_file():
        raise InputError(f"weights {place} do not exist.", remedy="Give the path of a .safetensors or .pt file.")
    if place.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load_file(place))
        except safetensors.SafetensorError as error:
            raise InputError(f"{place} is no safetensors file: {error}.") from None
    if _is_torchscript(place):
        raise InputError(
            f"{place} is a TorchScript archive, a program whose code would run here.",
            remedy="Save the state dict of the network in it as .safetensors.",
        )
    try:
        content = torch.load(place, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{place} is not a file of plain tensors: {reason}", remedy="Save a state dict.") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(f"{place} holds a {type(content).__name__} that is not tensors by name.")
    return {str(name): value for name, value in content.items()}


def fit_weights(model: nn.Module, weights: dict[str, torch.Tensor], *, path: str | Path) -> None:
    """Load weights by name into `model`, in eval mode and frozen; `InputError` names the first that does not fit."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights and not name.endswith(OPTIONAL_SUFFIX)]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        raise InputError(f"{path} does not fit: {problems[0]} ({len(problems)} such names).", remedy="Is it the file?")
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    model.eval().requires_grad_(False)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in names)


def digest_of(path: str | Path) -> str:
    """sha256 of a weights file."""
    return sha256_file(Path(path))
