"""Reading foreign checkpoints without running their code, and loading weights with errors that name the misfit."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.errors import InputError


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a `.pt`/`.pth` file; besides tensors only `argparse.Namespace` is allowed in it.

    Raises `InputError` when the file is missing, is no checkpoint, or holds any other object.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist.", remedy="Give the path of a .pth file.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} is not a checkpoint of plain tensors: {reason}", remedy="Export its weights."
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}.", remedy="A checkpoint is a dictionary of weights.")
    return content


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], *, assign: bool = False) -> None:
    """Copy weights by name; `InputError` names what is missing, unknown or of another shape.

    `assign` takes the tensors themselves, for a model built on the meta device.
    """
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)} where the config needs {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        listed = "; ".join(problems[:3])
        raise InputError(f"{len(problems)} weights do not fit: {listed}.", remedy="Check the sizes in the config.")
    model.load_state_dict(dict(weights), assign=assign)
