"""Frozen configs: unknown keys refused with a suggestion, dotted overrides, one digest per config.

A preset is a Python function that returns a full config; there is no YAML and no registry of names.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.digests import pretty_json, sha256_json
from infra.errors import ConfigError, InputError

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every configuration: frozen, strict about keys, hashable by content."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, every default spelled out."""
        return self.model_dump(mode="json")

    def digest(self, *, exclude: frozenset[str] = frozenset()) -> str:
        """sha256 of the resolved config; `exclude` leaves out top-level fields that do not change the result."""
        return sha256_json({key: value for key, value in self.to_json().items() if key not in exclude})

    @classmethod
    def parse(cls, value: dict[str, Any]) -> Self:
        """Validate plain values; raises `ConfigError` with one line per wrong key."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ConfigError(explain(cls, error)) from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a config saved by `save`."""
        if not path.is_file():
            raise InputError(f"config file {path} does not exist.", remedy="Give the path of a JSON config.")
        try:
            value = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from None
        return cls.parse(value)

    def save(self, path: Path) -> None:
        """Write the resolved config, parents created."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pretty_json(self.to_json()))


def override(config: ConfigT, assignments: list[str] | tuple[str, ...]) -> ConfigT:
    """Apply dotted `key=value` assignments, e.g. `["optim.lr=1e-3", "data.gap=[4, 48]"]`.

    Values are JSON where they parse as JSON, else strings. Unknown keys raise `ConfigError` with a suggestion.
    """
    value = config.to_json()
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        if not separator or not dotted.strip():
            raise ConfigError(f"override {assignment!r} is not of the form key=value.", remedy="E.g. -o optim.lr=1e-3")
        _assign(value, dotted.strip(), _parse_value(text.strip()))
    return type(config).parse(value)


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"None": None, "True": True, "False": False}.get(text, text)


def _assign(value: dict[str, Any], dotted: str, leaf: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = value
    for depth, key in enumerate(parents):
        if not isinstance(node, dict) or key not in node:
            raise _unknown_key(".".join(parents[: depth + 1]), key, node)
        node = node[key]
    if not isinstance(node, dict) or last not in node:
        raise _unknown_key(dotted, last, node)
    node[last] = leaf


def _unknown_key(dotted: str, key: str, node: Any) -> ConfigError:
    known = list(node) if isinstance(node, dict) else []
    return ConfigError(f"unknown config key {dotted!r}.", remedy=_suggestion(key, known))


def _suggestion(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known keys: {', '.join(sorted(known)) or 'none (this is a leaf)'}."


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """One sentence per problem of a pydantic error, with a suggestion for unknown keys."""
    lines = []
    for problem in error.errors(include_url=False):
        dotted = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _fields_at(cls, problem["loc"][:-1])
            lines.append(f"unknown config key {dotted!r}. {_suggestion(str(problem['loc'][-1]), known)}")
        else:
            lines.append(f"{cls.__name__}.{dotted} = {problem.get('input')!r}: {problem['msg']}.")
    return " ".join(lines)


def _fields_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    current: Any = cls
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        current = field.annotation if field else None
    return list(getattr(current, "model_fields", {}))
