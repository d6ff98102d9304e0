"""CSV files that come with a corpus."""

from __future__ import annotations

import csv
import io

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
