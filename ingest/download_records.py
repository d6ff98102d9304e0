"""What lies in a folder of downloads besides the files: the rows that were asked for, and what became of each address.

    table.json                 names the row files; replaced in one go
    rows/HASH.jsonl            up to 100,000 rows each, named by content
    outcomes/000001.jsonl      a segment: what became of some addresses; never changed, later ones count
    ab/abcdef....mp4           the files, named by a hash of their address

Segments instead of one file because an object store cannot append, and instead of one record an address because a
million tiny objects take hours to list and read. A kill loses at most the last segment's minute of records: files
that lie there are known by their names, failures are tried again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal, TypeVar

from pydantic import ValidationError

from infra.config import Config
from infra.digests import sha256_bytes
from infra.errors import DataError, InputError
from infra.storage import create_only, exists, join, list_names, read_bytes, read_json, remove, write_bytes, write_json
from ingest.schema import ReasonCode

TABLE, ROWS, OUTCOMES = "table.json", "rows", "outcomes"
FORMAT_VERSION = 1
ROWS_PER_FILE = 100_000
FILE_NAME = re.compile(r"[0-9a-f]{2}/([0-9a-f]{40})\.[a-z0-9]+")
THREADS = 8
RecordT = TypeVar("RecordT", bound=Config)


class DownloadRow(Config):
    """One clip asked for. `file` is the stem of its file, `address` what may be shown of its address."""

    source_id: str
    file: str = ""
    address: str = ""
    text: str = ""
    label: str = ""
    start_s: float | None = None
    end_s: float | None = None
    id: str = ""  # of the table, where it is not the source_id
    problem: str = ""  # why the row cannot be used


class Outcome(Config):
    """What became of an address: `path` of a complete file, or the `reason` and message of a failure.

    `sha256` and `size_bytes` are empty for a file that a killed run left without noting it.
    """

    file: str
    path: str = ""
    sha256: str = ""
    size_bytes: int = 0
    reason: ReasonCode | Literal[""] = ""
    message: str = ""
    attempts: int = 0


def file_stem(url: str) -> str:
    """The name of an address's file, without folder and suffix."""
    return sha256_bytes(url.encode(errors="surrogatepass"))[:40]


def file_path(stem: str, suffix: str) -> str:
    """Where the file lies, relative to the folder of downloads."""
    return f"{stem[:2]}/{stem}{suffix}"


def files_there(root: str) -> dict[str, str]:
    """Stem -> path of each complete file."""
    matches = (FILE_NAME.fullmatch(name) for name in list_names(root, recursive=True))
    return {match[1]: match[0] for match in matches if match}


def write_rows(root: str, rows: Iterable[DownloadRow]) -> None:
    """Put these rows in place of what was asked for before."""
    iterator, names = iter(rows), list[str]()
    while part := list(islice(iterator, ROWS_PER_FILE)):
        data = _lines(part)
        names.append(f"{len(names):04d}-{sha256_bytes(data)[:12]}.jsonl")
        if not exists(join(root, ROWS, names[-1])):
            write_bytes(join(root, ROWS, names[-1]), data)
    write_json(join(root, TABLE), {"format_version": FORMAT_VERSION, "rows": names})
    for name in set(list_names(join(root, ROWS))) - set(names):
        remove(join(root, ROWS, name))


def read_rows(root: str) -> Iterator[DownloadRow]:
    """The rows asked for, in the order of their tables. Raises `InputError` where nothing was downloaded."""
    place = join(root, TABLE)
    if not exists(place):
        raise InputError(f"{root} is no folder of downloads.", remedy="`foreframe ingest urls TABLE OUT` makes one.")
    record = read_json(place)
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{place} is of another version.", remedy="Give a new folder of downloads.")
    for name in record["rows"]:
        yield from _parse(DownloadRow, join(root, ROWS, name))


def add_outcomes(root: str, outcomes: Sequence[Outcome]) -> None:
    """A new segment with these outcomes, after all others."""
    names = list_names(join(root, OUTCOMES), suffix=".jsonl")
    number = int(names[-1].partition(".")[0]) if names else 0
    data = _lines(outcomes)
    while True:
        number += 1
        if create_only(join(root, OUTCOMES, f"{number:06d}.jsonl"), data):
            return


def read_outcomes(root: str) -> dict[str, Outcome]:
    """Stem -> the last outcome noted."""
    places = [join(root, OUTCOMES, name) for name in list_names(join(root, OUTCOMES), suffix=".jsonl")]
    with ThreadPoolExecutor(THREADS) as pool:
        segments = pool.map(lambda place: list(_parse(Outcome, place)), places)
        return {outcome.file: outcome for segment in segments for outcome in segment}


def _lines(records: Iterable[Config]) -> bytes:
    """One line a record, without the fields that say nothing."""
    plain = (record.model_dump(mode="json", exclude_defaults=True) for record in records)
    return "".join(json.dumps(value, ensure_ascii=True) + "\n" for value in plain).encode()


def _parse(kind: type[RecordT], place: str) -> Iterator[RecordT]:
    try:
        for line in read_bytes(place).splitlines():
            yield kind.model_validate_json(line)
    except ValidationError:
        raise DataError(f"{place} holds a line that is no {kind.__name__}.", remedy="Was it edited?") from None
