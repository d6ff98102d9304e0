"""Tables that come with a corpus, whatever wrote them: CSV, JSON (a list or one object a line) and Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from infra.errors import InputError
from infra.storage import read_bytes

TABLE_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")


def read_table(place: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """(columns, rows) of a file or object, every cell as text; cells that a row lacks are empty.

    The suffix names the format. Raises `InputError` for content that is not of it.
    """
    data = read_bytes(place)
    if place.endswith(".parquet"):
        return _parquet(data, place)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{place} is not UTF-8 text.") from None
    if place.endswith((".json", ".jsonl")):
        return _json(text, place)
    rows = csv.DictReader(io.StringIO(text, newline=""), restval="")
    try:
        return tuple(rows.fieldnames or ()), [{key: row[key] for key in rows.fieldnames or ()} for row in rows]
    except csv.Error as error:
        raise InputError(f"{place} is no CSV: {error}.", remedy="Is a quote missing?") from None


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


def seconds(text: str) -> float | None:
    """A time from 0 on; None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _parquet(data: bytes, place: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except pyarrow.ArrowException as error:
        raise InputError(f"{place} is no Parquet file: {str(error).splitlines()[0]}.") from None
    return tuple(table.column_names), [_row(row, place) for row in table.to_pylist()]


def _json(text: str, place: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    try:
        found = [json.loads(line) for line in text.splitlines() if line.strip()] if place.endswith("l") else None
        values = json.loads(text) if found is None else found
        json.dumps(values, ensure_ascii=False).encode()  # half surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON: {error}.") from None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InputError(f"{place} is no list of objects.", remedy='Expected [{"path": ..., "text": ...}, ...].')
    columns = tuple(dict.fromkeys(key for value in values for key in value))
    return columns, [_row({key: value.get(key) for key in columns}, place) for value in values]


def _row(values: dict[str, Any], place: str) -> dict[str, str]:
    row = {}
    for key, value in values.items():
        if value is not None and not isinstance(value, str | int | float):
            raise InputError(f"{place} has a {type(value).__name__} in column {key!r} where text or a number belongs.")
        row[key] = "" if value is None else str(value)
    return row
