"""The publications' tables with the numbers of one evaluation in a row of their own."""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.published import BesideRow, beside, load_table
from evaluation.result import EvaluationResult

OURS = "this evaluation"
METAWORLD, CALVIN = "vpp-2", "vpp-1"
SPLITS = ("easy", "middle", "hard")
UNCONFIRMED = "not confirmed against the publication"


@dataclass(frozen=True)
class PublishedTableRow:
    """A method and its cells, in the order of the columns."""

    name: str
    cells: tuple[str, ...]
    is_ours: bool


@dataclass(frozen=True)
class PublishedTableView:
    """One table of a publication, our row last."""

    title: str
    setting: str
    columns: tuple[str, ...]
    rows: tuple[PublishedTableRow, ...]
    note: str


def published_tables(result: EvaluationResult) -> tuple[PublishedTableView, ...]:
    """The tables that report the benchmark of this result; none for one that nobody published."""
    if result.suite.startswith("metaworld"):
        return (_table(METAWORLD, _metaworld(result)),)
    if result.suite.startswith("calvin"):
        columns = load_table(CALVIN).columns
        return (_table(CALVIN, {name: result.scores[name].value for name in columns if name in result.scores}),)
    return ()


def _metaworld(result: EvaluationResult) -> dict[str, float]:
    splits = {name: result.scores.get(f"split/{name}") for name in SPLITS}
    found = {name: score.value for name, score in splits.items() if score is not None}
    return found | {"average": result.scores[result.primary_metric].value}


def _table(table_id: str, ours: dict[str, float]) -> PublishedTableView:
    table = load_table(table_id)
    rows = beside(table_id, {f"{OURS}/{column}": value for column, value in ours.items()})
    unconfirmed = any(not value.confirmed for row in rows for value in row.published.values())
    notes = [
        f"[?]: {UNCONFIRMED}" if unconfirmed else "",
        table.note,
        *(f"{row.name}: {row.note}" for row in rows if row.note),
    ]
    return PublishedTableView(
        title=table.title,
        setting=table.setting,
        columns=tuple(column.replace("_", " ") for column in table.columns),
        rows=tuple(PublishedTableRow(row.name, _cells(row, table.columns), bool(row.ours)) for row in rows),
        note=" ".join(note.rstrip(".") + "." for note in notes if note),
    )


def _cells(row: BesideRow, columns: tuple[str, ...]) -> tuple[str, ...]:
    def shown(column: str) -> str:
        if column in row.ours:
            return f"{row.ours[column]:.3f}"
        if column not in row.published:
            return ""
        value = row.published[column]
        return f"{value.value}" if value.confirmed else f"{value.value} [?]"

    return tuple(shown(column) for column in columns)
