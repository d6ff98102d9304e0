"""The clips of a data set as rows in memory, read in the background, filtered on the server.

A walk over the records of all shards fills the table while it is being looked at; no pixels are read. A row costs about
a kilobyte, so 100,000 clips fit easily.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from sys import intern

from infra.errors import ForeframeError
from infra.storage import is_remote
from ingest.reader import ShardDataset
from ingest.schema import DEFAULT_CAMERA, SampleRecord

log = logging.getLogger(__name__)

MAX_PROBLEMS = 20
MAX_SELECTIONS = 16
BATCH = 512
REMOTE_THREADS = 16  # a remote record is one small request that mostly waits


@dataclass(frozen=True, slots=True)
class Row:
    """One clip. `number` is its index in the reader; `words` is what the text search looks through."""

    number: int
    key: str
    source_id: str
    corpus: str
    label: str
    text: str
    split: str
    fps: float
    num_frames: int
    cameras: tuple[str, ...]
    unverified: bool
    words: str


@dataclass(frozen=True)
class Filter:
    """Which clips are listed; an empty field lets all through."""

    corpus: str = ""
    label: str = ""
    split: str = ""
    text: str = ""
    unverified: bool = False

    def admits(self, row: Row) -> bool:
        """Every word of `text` must occur somewhere; the other fields are equal or empty."""
        return (
            (not self.corpus or row.corpus == self.corpus)
            and (not self.label or row.label == self.label)
            and (not self.split or row.split == self.split)
            and (not self.unverified or row.unverified)
            and all(word in row.words for word in self.text.casefold().split())
        )


class Table:
    """Fills itself in a thread of its own after `start`. Rows are only ever appended, so readers need no lock."""

    def __init__(self, url: str) -> None:
        self._data = ShardDataset(url)  # not the one that is played from: a handle belongs to one thread
        self.num_samples = len(self._data)
        self.rows: list[Row] = []
        self.num_problems = 0
        self.problems: list[str] = []
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in ("corpus", "label", "split")}
        self._by_name: dict[str, Row] = {}
        self._selections: OrderedDict[Filter, tuple[int, list[int]]] = OrderedDict()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="view-table", daemon=True)

    @property
    def num_read(self) -> int:
        """Records looked at so far, those that could not be read among them."""
        return len(self.rows) + self.num_problems

    @property
    def is_complete(self) -> bool:
        """Whether every record was looked at."""
        return self.num_read == self.num_samples

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def join(self) -> None:
        """Wait until every record was looked at."""
        self._thread.join()

    def stop(self) -> None:
        """End the reading early."""
        self._stopping.set()
        self._thread.join()

    def find(self, name: str) -> Row | None:
        """The row of a key or a source id, if it was read already."""
        return self._by_name.get(name)

    def select(self, wanted: Filter) -> Sequence[int]:
        """Positions of the rows that a filter admits, in order. A repeated filter only looks at new rows."""
        with self._lock:
            seen, positions = self._selections.pop(wanted, (0, []))
            end = len(self.rows)
            positions.extend(position for position in range(seen, end) if wanted.admits(self.rows[position]))
            self._selections[wanted] = (end, positions)
            while len(self._selections) > MAX_SELECTIONS:
                self._selections.popitem(last=False)
            return positions

    def counted(self) -> dict[str, list[tuple[str, int]]]:
        """Values of corpus, label and split, most frequent first."""
        with self._lock:
            return {name: counts.most_common() for name, counts in self.counts.items()}

    def _fill(self) -> None:
        for number, found in self._records():
            if isinstance(found, SampleRecord):
                self._add(row_of(number, found))
            else:
                self._note(found)
        log.debug("view: %d of %d records read", len(self.rows), self.num_samples)

    def _records(self) -> Iterator[tuple[int, SampleRecord | Exception]]:
        with ThreadPoolExecutor(REMOTE_THREADS if is_remote(self._data.url) else 1, "view-record") as pool:
            for first in range(0, self.num_samples, BATCH):
                numbers = range(first, min(first + BATCH, self.num_samples))
                for number, found in zip(numbers, pool.map(self._peek, numbers), strict=True):
                    if self._stopping.is_set():
                        pool.shutdown(cancel_futures=True)
                        return
                    yield number, found

    def _peek(self, number: int) -> SampleRecord | Exception:
        try:
            return self._data.peek(number)
        except (ForeframeError, OSError) as error:  # one damaged shard must not hide the others
            return error

    def _add(self, row: Row) -> None:
        with self._lock:
            for name, counts in self.counts.items():
                counts[getattr(row, name)] += 1
        self._by_name.setdefault(row.source_id, row)
        self._by_name[row.key] = row  # a key wins over a source id that spells the same
        self.rows.append(row)

    def _note(self, error: Exception) -> None:
        self.num_problems += 1
        text = str(error)
        if len(self.problems) < MAX_PROBLEMS and text not in self.problems:
            log.warning("view: %s", text)
            self.problems.append(text)


def row_of(number: int, record: SampleRecord) -> Row:
    """What the list shows of a record."""
    cameras = tuple(intern(name) for name in record.cameras)
    first = record.cameras.get(DEFAULT_CAMERA) or record.cameras[cameras[0]]
    return Row(
        number=number,
        key=record.key,
        source_id=record.source_id,
        corpus=intern(record.corpus),
        label=intern(record.label),
        text=record.text,
        split=intern(str(record.metadata.get("split") or "train")),
        fps=first.fps,
        num_frames=first.num_frames,
        cameras=cameras,
        unverified=any(camera.length == "unverified" for camera in record.cameras.values()),
        words="\n".join((record.key, record.source_id, record.label, record.text)).casefold(),
    )
