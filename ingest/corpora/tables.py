"""CSV and JSON files that come with a corpus."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from infra.errors import InputError
from infra.storage import read_bytes


def read_table(place: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """(columns, rows) of a CSV file or object; cells that a row lacks are empty. `InputError` unless it is UTF-8."""
    try:
        text = read_bytes(place).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{place} is not UTF-8 text.") from None
    rows = csv.DictReader(io.StringIO(text, newline=""), restval="")
    return tuple(rows.fieldnames or ()), list(rows)


def read_object(place: str) -> dict[str, Any]:
    """The object in a JSON file. `InputError` unless it is one and its text fits UTF-8 (no half surrogate pairs)."""
    record = parse_object(read_bytes(place))
    if record is None:
        raise InputError(f"{place} is no JSON object.")
    return record


def parse_object(data: bytes) -> dict[str, Any] | None:
    """A JSON object of UTF-8 text, None for anything else."""
    try:
        record = json.loads(data)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
