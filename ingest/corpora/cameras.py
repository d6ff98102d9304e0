"""What a corpus calls its cameras, as names that may stand in files and options."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ingest.schema import DEFAULT_CAMERA


def camera_names(keys: Sequence[str], prefixes: Sequence[str]) -> dict[str, str]:
    """Key -> camera name, each once: the key without the first prefix that fits, `main` for an only one.

    Where two keys would have one name, they keep their prefixes, and a number tells apart what is still the same.
    """
    if len(keys) == 1:
        return {keys[0]: DEFAULT_CAMERA}
    short = {key: safe_name(_without(key, prefixes)) for key in keys}
    names: dict[str, str] = {}
    for key in sorted(keys):
        name = short[key] if list(short.values()).count(short[key]) == 1 else safe_name(key)
        number, free = 1, name
        while free in names.values():
            number += 1
            free = f"{name}-{number}"
        names[key] = free
    return names


def safe_name(text: str, *, blank: str = "-") -> str:
    """`text` with letters, digits, `-` and `_` only, starting with a letter or digit; `unnamed` if nothing is left."""
    return re.sub(r"[^A-Za-z0-9_-]", blank, text).lstrip("-_") or "unnamed"


def _without(key: str, prefixes: Sequence[str]) -> str:
    return next((key[len(prefix) :] for prefix in prefixes if key.startswith(prefix)), key)
