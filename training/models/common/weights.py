"""Reading foreign checkpoints without running their code, and loading weights with errors that name the misfit."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.errors import InputError


class PassedOver:
    """Stands for an object of a class that is named in a checkpoint and neither imported nor read."""

    def __init__(self, *state: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _plain_dict(*factory: object) -> dict[Any, Any]:
    """What takes the place of a defaultdict."""
    return {}


# All that OmegaConf's settings are pickled with. Types occur as values in them; none is ever called.
_OMEGACONF = (
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata", "UnionNode")),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path")),
    *("omegaconf.nodes.EnumNode", "omegaconf.nodes.InterpolationResultNode"),
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Tuple", "Union", "Optional")),
    *(f"__builtin__.{name}" for name in ("dict", "list", "tuple", "long", "int", "float", "bool", "str", "unicode")),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "bool", "str", "bytes")),
)


def read_checkpoint(path: Path, *, settings: bool = False) -> dict[str, Any]:
    """Content of a `.pt`/`.pth` file; besides tensors only `argparse.Namespace` is allowed in it.

    With `settings`, OmegaConf objects are allowed as well and come out as empty `PassedOver` objects.
    Raises `InputError` when the file is missing, is no checkpoint, or holds any other object.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist.", remedy="Give the path of a .pth file.")
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]
    if settings:
        allowed += [(PassedOver, name) for name in _OMEGACONF] + [(_plain_dict, "collections.defaultdict")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            f"{path} is not a checkpoint of plain tensors: {_reason(error)}", remedy="Export its weights."
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}.", remedy="A checkpoint is a dictionary of weights.")
    return content


def _reason(error: Exception) -> str:
    """One line: what torch refused where it says so, else the first line it has."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it holds {found.group(1)}."
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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
