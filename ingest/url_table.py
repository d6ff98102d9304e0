"""Tables of addresses: `.csv` and `.parquet` files, one or a folder of them, row by row.

Columns: `url` or `address`; optional `text` or `caption`, `label`, `start_s`, `end_s` (seconds), `id` or `key`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from infra.errors import InputError
from infra.storage import as_arrow, exists, join, list_names, read_bytes

SUFFIXES = (".csv", ".parquet")
COLUMNS = {
    "url": ("url", "address"),
    "text": ("text", "caption"),
    "label": ("label",),
    "start_s": ("start_s",),
    "end_s": ("end_s",),
    "id": ("id", "key"),
}
BATCH_ROWS = 8192


class UrlRow(NamedTuple):
    """One row. `problem` says why it names no video's span; `place` is where it stands, e.g. "a.csv row 3"."""

    url: str
    text: str
    label: str
    start_s: float | None
    end_s: float | None
    id: str
    problem: str
    place: str


def read_rows(source: str) -> Iterator[UrlRow]:
    """All rows of a table, or of the tables of a folder by name. Raises `InputError` naming what was expected."""
    for name, place in _tables(source):
        columns, rows = _read_parquet(place) if place.lower().endswith(".parquet") else _read_csv(place)
        chosen = {field: next((name for name in names if name in columns), "") for field, names in COLUMNS.items()}
        if not chosen["url"]:
            raise InputError(
                f"{place} has no column 'url' or 'address' (it has {', '.join(columns) or 'none'}).",
                remedy="Optional columns: text, label, start_s, end_s, id.",
            )
        for number, row in enumerate(rows, 1):
            yield _row(row, chosen, f"{name} row {number}")


def _tables(source: str) -> list[tuple[str, str]]:
    """(name, url) of each table."""
    expected = "Expected a .csv or .parquet file, or a folder of them."
    if source.lower().endswith(SUFFIXES):
        if not exists(source):
            raise InputError(f"{source} does not exist.", remedy=expected)
        return [(PurePosixPath(source).name, source)]
    names = [name for name in list_names(source, recursive=True) if name.lower().endswith(SUFFIXES)]
    shown = [name for name in names if not any(part[0] in "._" for part in PurePosixPath(name).parts)]
    if not shown:
        raise InputError(f"{source} holds no table of addresses.", remedy=expected)
    return [(name, join(source, name)) for name in shown]


def _row(row: dict[str, Any], chosen: dict[str, str], place: str) -> UrlRow:
    text = {field: _text(row.get(column)) for field, column in chosen.items()}
    problem = ""
    try:
        start, end = _seconds(text["start_s"]), _seconds(text["end_s"])
    except ValueError:
        start = end = math.nan
    if not text["url"]:
        problem = f"{place} holds no address"
    elif not (start or 0.0) < (math.inf if end is None else end):
        problem = f"{place} has seconds {text['start_s']!r} to {text['end_s']!r}: no video's span"
    if problem:
        start = end = None
    return UrlRow(text["url"], text["text"], text["label"], start, end, text["id"], problem, place)


def _text(value: Any) -> str:
    """A cell as text; an absent or NaN cell is empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()


def _seconds(text: str) -> float | None:
    """A time from 0 on, None for an empty cell. Raises `ValueError`."""
    if not text:
        return None
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def _read_csv(place: str) -> tuple[list[str], Iterable[dict[str, Any]]]:
    stream = io.TextIOWrapper(io.BytesIO(read_bytes(place)), encoding="utf-8-sig", newline="")
    reader = csv.DictReader(stream, restval="")
    try:
        columns = list(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(place, error) from None
    return columns, _csv_rows(reader, place)


def _csv_rows(reader: csv.DictReader[str], place: str) -> Iterator[dict[str, Any]]:
    try:
        yield from reader
    except (UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(place, error) from None


def _read_parquet(place: str) -> tuple[list[str], Iterable[dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = as_arrow(place)
    try:
        table = pq.ParquetFile(fs.open_input_file(path))
    except pa.ArrowInvalid as error:
        raise _unreadable(place, error) from None
    columns = list(table.schema_arrow.names)
    wanted = [name for names in COLUMNS.values() for name in names if name in columns]
    return columns, _parquet_rows(table, wanted, place)


def _parquet_rows(table: Any, wanted: list[str], place: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    try:
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(place, error) from None


def _unreadable(place: str, error: Exception) -> InputError:
    kind = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "a readable table"
    return InputError(f"{place} is not {kind}: {str(error).splitlines()[0]}.", remedy="Write it again.")
