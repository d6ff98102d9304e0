"""The published tables of the Video Prediction Policy, and ours beside them.

The data is `vpp.json`. Numbers of systems that are not rebuilt here (RT-1, GR-1, MDT, VidMan, Robo-Flamingo,
RoboUniview) exist only there.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from infra.config import Config
from infra.errors import ConfigError

DATA = Path(__file__).with_name("vpp.json")
UNCONFIRMED = "[?]"
OURS = "ours"


class PublishedValue(Config):
    """One number of a table. Not confirmed: remembered, and not checked against the publication."""

    value: float | str  # text only where the table holds sizes
    source: str
    confirmed: bool


class PublishedRow(Config):
    """A method or variant, and its values by column; a column without a value is absent."""

    name: str
    values: dict[str, PublishedValue]
    note: str = ""


class PublishedTable(Config):
    """A table of the paper (`vpp-1` is its Table 1) and the setting in which its numbers were measured."""

    table_id: str
    title: str
    setting: str
    columns: tuple[str, ...]
    primary: str  # the column that stands for a row
    unit: str
    note: str = ""
    rows: tuple[PublishedRow, ...]

    def row(self, name: str) -> PublishedRow:
        """A row by name; `ConfigError` with a suggestion when there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise ConfigError(
            f"{self.table_id} has no row {name!r}.", remedy=_suggestion(name, [row.name for row in self.rows])
        )


@dataclass(frozen=True)
class BesideRow:
    """What was published for a row, and ours: neither needs to be complete. The two were measured differently."""

    name: str
    published: Mapping[str, PublishedValue] = field(default_factory=dict)
    ours: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    settings_differ: str = ""  # the published setting, which ours is not


def table_ids() -> tuple[str, ...]:
    """`vpp-1` and so on, in the order of the paper."""
    return tuple(_tables())


def load_table(table_id: str) -> PublishedTable:
    """A table by id; `ConfigError` with a suggestion when there is none."""
    tables = _tables()
    if table_id not in tables:
        raise ConfigError(f"no published table {table_id!r}.", remedy=_suggestion(table_id, list(tables)))
    return tables[table_id]


def beside(table_id: str, ours: Mapping[str, float]) -> tuple[BesideRow, ...]:
    """The table's rows with our numbers beside them; own rows that the table lacks follow at the end.

    A key of `ours` is `ROW` (the table's primary column) or `ROW/COLUMN`, e.g. `VPP/success_1`. Every row says that
    the settings differ: no number of ours is a reproduction of the one beside it. Raises `ConfigError` for a column
    that the table does not have and for a number that is not finite.
    """
    table = load_table(table_id)
    found: dict[str, dict[str, float]] = {}
    for key, value in ours.items():
        name, column = _place(table, key)
        if not math.isfinite(value):
            raise ConfigError(f"{key} = {value} is not a number to publish.", remedy="Leave it out.")
        found.setdefault(name, {})[column] = float(value)
    rows = [
        BesideRow(row.name, row.values, found.pop(row.name, {}), row.note, settings_differ=table.setting)
        for row in table.rows
    ]
    rows += [BesideRow(name, ours=values, settings_differ=table.setting) for name, values in found.items()]
    return tuple(rows)


def as_markdown(table_id: str, ours: Mapping[str, float] | None = None) -> str:
    """The table as text, ours beside each published number, unconfirmed ones marked `[?]`, and what must be said."""
    table = load_table(table_id)
    rows = beside(table_id, ours or {})
    columns = list(table.columns)
    own = [column for column in columns if any(column in row.ours for row in rows)]
    heads = ["", *columns, *(f"{OURS}: {column}" for column in own)]
    lines = [f"**{table.title}** ({table.unit})", "", _line(heads), _line(["---"] * len(heads))]
    for row in rows:
        published = [_shown(row.published.get(column)) for column in columns]
        lines.append(_line([row.name, *published, *(_number(row.ours.get(column)) for column in own)]))
    notes = [f"Published: {table.setting}."]
    if ours:
        notes.append("Ours were measured in another setting: beside, not against.")
    if any(not value.confirmed for row in rows for value in row.published.values()):
        notes.append(f"{UNCONFIRMED} = not confirmed against the publication.")
    notes += [table.note, *(f"{row.name}: {row.note}" for row in rows if row.note)]
    return "\n".join([*lines, "", " ".join(note.rstrip(".") + "." for note in notes if note)]) + "\n"


@lru_cache(maxsize=1)
def _tables() -> dict[str, PublishedTable]:
    value = json.loads(DATA.read_text())
    sources = value["sources"]
    return {table["table_id"]: PublishedTable.parse(_sourced(table, sources)) for table in value["tables"]}


def _sourced(table: dict[str, Any], sources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The table with each value's source spelled out; that a value is confirmed follows from its source."""
    rows = []
    for row in table["rows"]:
        values = {
            column: {
                "value": cell["value"],
                "source": sources[cell["source"]]["text"],
                "confirmed": sources[cell["source"]]["confirmed"],
            }
            for column, cell in row["values"].items()
        }
        rows.append(row | {"values": values})
    return table | {"rows": rows}


def _place(table: PublishedTable, key: str) -> tuple[str, str]:
    name, slash, column = key.rpartition("/")
    if not slash:
        return key, table.primary
    if column not in table.columns:
        raise ConfigError(
            f"{table.table_id} has no column {column!r}.", remedy=_suggestion(column, list(table.columns))
        )
    return name, column


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."


def _shown(value: PublishedValue | None) -> str:
    if value is None:
        return ""
    text = value.value if isinstance(value.value, str) else _number(value.value)
    return text if value.confirmed else f"{text} {UNCONFIRMED}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
