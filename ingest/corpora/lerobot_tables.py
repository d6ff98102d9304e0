"""The tables of a LeRobot data set: JSON lines and Parquet, read by range where they are large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from infra.errors import InputError
from infra.storage import as_arrow, is_remote, join, read_bytes
from ingest.corpora.tables import parse_object

T = TypeVar("T")
EPISODE, FRAME = "episode_index", "frame_index"
MAX_COLUMNS_BYTES = 1 << 30  # of one episode's row groups, unpacked, without pictures
PICTURES_AT_ONCE = 16
FAULTS = (OSError, pyarrow.ArrowException, UnicodeDecodeError)


def read_lines(root: str, name: str) -> list[dict[str, Any]]:
    """The objects of a JSON lines file. `InputError` naming the line that is none."""
    rows = []
    for number, line in enumerate(read_bytes(join(root, name)).splitlines(), 1):
        if not line.strip():
            continue
        if (row := parse_object(line)) is None:
            raise InputError(f"{join(root, name)}: line {number} is no JSON object.")
        rows.append(row)
    return rows


def read_rows(root: str, name: str, *, without: str) -> list[dict[str, Any]]:
    """All rows of a Parquet file, all columns but those that start with `without`. `InputError` when it is none."""

    def rows(file: Any) -> list[dict[str, Any]]:
        columns = [column for column in file.schema_arrow.names if not column.startswith(without)]
        return list(file.read(columns=columns).to_pylist())

    return _with_file(root, name, rows)


def read_episode(root: str, name: str, episode: int, columns: Sequence[str]) -> Any:
    """The Arrow table of an episode's rows; only the row groups that may hold them are read.

    Raises `InputError` when a column is missing, the frames are not 0, 1, 2, ..., or the rows claim too much memory.
    """

    def rows(file: Any) -> Any:
        wanted = _known_columns(file, name, [EPISODE, FRAME, *columns])
        groups = _row_groups(file, name, episode)
        _check_size(file, groups, wanted, name)
        table = file.read_row_groups(groups, columns=wanted, use_threads=False)
        return table.filter(pyarrow.compute.equal(table[EPISODE], episode))

    table = _with_file(root, name, rows)
    if table[FRAME].to_pylist() != list(range(len(table))):
        raise InputError(f"{name}: the frames of episode {episode} are not numbered 0, 1, 2, ...")
    return table


def iterate_pictures(root: str, name: str, episode: int, column: str) -> Iterator[bytes]:
    """The encoded pictures of an episode, a few rows in memory at a time. `InputError`, also while iterating."""
    number = 0
    for batch in _batches(root, name, episode, column):
        cells = batch[column]
        if not pyarrow.types.is_struct(cells.type) or cells.type.get_field_index("bytes") < 0:
            raise InputError(f"{name}: {column} holds {cells.type}, no pictures.")
        values = (values.to_pylist() for values in (batch[EPISODE], batch[FRAME], cells.field("bytes")))
        for owner, frame, data in zip(*values, strict=True):
            if owner != episode:
                continue
            if frame != number or not isinstance(data, bytes):
                what = "has no bytes" if frame == number else f"stands where {number} is due"
                raise InputError(f"{name}: {column} of episode {episode}: frame {frame} {what}.")
            yield data
            number += 1


def _batches(root: str, name: str, episode: int, column: str) -> Iterator[Any]:
    done = 0
    for last, opened in _ways(root, name):
        try:
            with opened() as file:
                wanted = _known_columns(file, name, [EPISODE, FRAME, column])
                groups = _row_groups(file, name, episode)
                batches = file.iter_batches(PICTURES_AT_ONCE, row_groups=groups, columns=wanted, use_threads=False)
                for number, batch in enumerate(batches):
                    if number >= done:
                        yield batch
                        done += 1
            return
        except FAULTS as error:
            if last:
                raise _unreadable(name, error) from None


def _with_file(root: str, name: str, use: Callable[[Any], T]) -> T:
    for last, opened in _ways(root, name):
        try:
            with opened() as file:
                return use(file)
        except FAULTS as error:
            if last:
                raise _unreadable(name, error) from None
    raise AssertionError("unreachable")


def _ways(root: str, name: str) -> Iterator[tuple[bool, Callable[[], Any]]]:
    """(is it the last, how to open the file): by range; then, where the store may be at fault, whole with retries."""
    place = join(root, name)

    def by_range() -> Any:
        filesystem, path = as_arrow(place)
        return pyarrow.parquet.ParquetFile(path, filesystem=filesystem)

    yield not is_remote(root), by_range
    yield True, lambda: pyarrow.parquet.ParquetFile(pyarrow.BufferReader(read_bytes(place)))


def _unreadable(name: str, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{name} does not exist.")
    return InputError(f"{name} is no readable Parquet file: {type(error).__name__}.")


def _known_columns(file: Any, name: str, columns: Sequence[str]) -> list[str]:
    known = set(file.schema_arrow.names)
    if missing := [column for column in columns if column not in known]:
        raise InputError(f"{name} has no column {missing[0]!r}.")
    return list(dict.fromkeys(columns))


def _row_groups(file: Any, name: str, episode: int) -> list[int]:
    """Those whose statistics do not rule the episode out."""
    places = [i for i in range(file.metadata.num_columns) if file.metadata.schema.column(i).path == EPISODE]
    if len(places) != 1 or not pyarrow.types.is_integer(file.schema_arrow.field(EPISODE).type):
        raise InputError(f"{name}: the column {EPISODE!r} holds no integers.")
    found = []
    for number in range(file.metadata.num_row_groups):
        known = file.metadata.row_group(number).column(places[0]).statistics
        if known is None or not known.has_min_max or known.min <= episode <= known.max:
            found.append(number)
    return found


def _check_size(file: Any, groups: Sequence[int], columns: Sequence[str], name: str) -> None:
    places = [
        i
        for i in range(file.metadata.num_columns)
        if any(f"{file.metadata.schema.column(i).path}.".startswith(f"{column}.") for column in columns)
    ]
    total = sum(file.metadata.row_group(number).column(i).total_uncompressed_size for number in groups for i in places)
    if total > MAX_COLUMNS_BYTES:
        raise InputError(f"{name} claims {total} bytes for the rows of one episode, above {MAX_COLUMNS_BYTES}.")
