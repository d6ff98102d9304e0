"""The stage before the plan of a `urls` ingest: every address of the table once, into one folder.

A file that is there is never fetched again; an address that failed is tried again only where that is asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from infra.addresses import host_of, neutral, shown
from infra.config import Config
from infra.digests import sha256_json
from infra.download import Downloaded, DownloadPolicy, delay_s, download_once
from infra.errors import ConfigError, DownloadError, InputError, TooManyFailuresError
from infra.faults import fault_point
from infra.media import VIDEO_SUFFIXES
from infra.settings import settings
from infra.storage import is_remote, join, put_file
from ingest import url_table
from ingest.download_records import (
    DownloadRow,
    Outcome,
    add_outcomes,
    file_path,
    file_stem,
    files_there,
    read_outcomes,
    write_rows,
)
from ingest.host_queue import HostQueue

log = logging.getLogger(__name__)

SUFFIX_OF_TYPE = {
    "video/3gpp": ".3gp",
    "video/mp4": ".mp4",
    "video/quicktime": ".mov",
    "video/webm": ".webm",
    "video/x-m4v": ".m4v",
    "video/x-matroska": ".mkv",
    "video/x-msvideo": ".avi",
}
FLUSH_OUTCOMES, FLUSH_S = 1000, 30.0
PROGRESS_S = 10.0
TICK_S = 0.25
MAX_ID_LENGTH = 200  # characters
NAMED_EXAMPLES = 3


class DownloadConfig(Config):
    """How addresses are fetched. Hosts of private networks are allowed by `FOREFRAME_DOWNLOAD_ALLOW_HOSTS` alone."""

    concurrency: int = Field(default=16, ge=1, le=256)
    per_host: int = Field(default=2, ge=1, description="downloads from one host at a time")
    host_delay_s: float = Field(default=0.0, ge=0, description="seconds between two starts at one host")
    max_bytes: int = Field(default=DownloadPolicy.max_bytes, ge=1)
    max_attempts: int = Field(default=DownloadPolicy.max_attempts, ge=1)
    connect_timeout_s: float = Field(default=DownloadPolicy.connect_timeout_s, gt=0)
    read_timeout_s: float = Field(default=DownloadPolicy.read_timeout_s, gt=0)
    deadline_s: float = Field(default=DownloadPolicy.deadline_s, gt=0, description="for one attempt")
    first_delay_s: float = Field(default=DownloadPolicy.first_delay_s, ge=0)
    max_delay_s: float = Field(default=DownloadPolicy.max_delay_s, ge=0, description="also of a Retry-After header")

    def policy(self) -> DownloadPolicy:
        """With the hosts that this machine's settings allow. Raises `ConfigError` for a malformed one."""
        hosts = [host.strip().lower() for host in settings().download_allow_hosts.split(",") if host.strip()]
        for host in hosts:
            if not host.rpartition(":")[0] or not host.rpartition(":")[2].isdecimal():
                raise ConfigError(
                    f"FOREFRAME_DOWNLOAD_ALLOW_HOSTS names {host!r}.", remedy="Give host:port, separated by commas."
                )
        values = self.model_dump(exclude={"concurrency", "per_host", "host_delay_s"})
        return DownloadPolicy(**values, allow_hosts=frozenset(host.replace("[", "").replace("]", "") for host in hosts))


@dataclass(frozen=True)
class Table:
    """The rows of a source, each once, and the address of every file stem."""

    rows: list[DownloadRow]
    urls: dict[str, str]

    def only(self, source_ids: frozenset[str] | None) -> Table:
        """The part of it with these source ids; None keeps all."""
        if source_ids is None:
            return self
        rows = [row for row in self.rows if row.source_id in source_ids]
        return Table(rows, {row.file: self.urls[row.file] for row in rows if row.file})


@dataclass
class _Task:
    stem: str
    url: str
    attempts: int = 0


def fetch_table(
    source: str,
    root: str,
    config: DownloadConfig,
    *,
    only: frozenset[str] | None = None,
    retry_failed: bool = False,
    max_failure_share: float = 1.0,
) -> None:
    """Fetch what `root` lacks of the table (of the rows with the source ids `only`), and note what became of it.

    Raises `TooManyFailuresError` where more than that share of the rows cannot be used, `InputError`, `StorageError`.
    """
    policy = config.policy()
    table = read_table(source).only(only)
    with _sole_user(root), _incoming(root) as folder:
        write_rows(root, table.rows)
        tasks, adopted = _missing(table, root, retry_failed=retry_failed)
        if adopted:
            add_outcomes(root, adopted)
        log.info("%d rows, %d addresses, %d to fetch", len(table.rows), len(table.urls), len(tasks))
        if tasks:
            _Fetch(tasks, root, folder, config, policy).run()
    _check_failures(table, read_outcomes(root), max_failure_share)


def describe(source: str, root: str) -> dict[str, Any]:
    """What a run would find, without fetching or writing anything."""
    table, outcomes, there = read_table(source), read_outcomes(root), files_there(root)
    failed = Counter(outcomes[stem].reason for stem in table.urls if stem in outcomes and stem not in there)
    failed.pop("", None)
    return {
        "rows": len(table.rows),
        "unusable_rows": sum(bool(row.problem) for row in table.rows),
        "addresses": len(table.urls),
        "hosts": len({host_of(url) for url in table.urls.values()}),
        "downloaded": sum(stem in there for stem in table.urls),
        "failed": dict(sorted(failed.items())),
    }


def read_table(source: str) -> Table:
    """Rows equal in address and span are one; ids are the table's where all its rows have one of their own."""
    found: dict[tuple[str, float | None, float | None] | str, url_table.UrlRow] = {}
    for row in url_table.read_rows(source):
        found.setdefault(row.place if row.problem else (row.url, row.start_s, row.end_s), row)
    usable = [row for row in found.values() if not row.problem]
    ids = {_clean_id(row.id) for row in usable}
    has_ids = len(ids) == len(usable) and "" not in ids
    return Table(
        rows=[_record(row, has_ids=has_ids) for row in found.values()],
        urls={file_stem(row.url): row.url for row in usable},
    )


def _record(row: url_table.UrlRow, *, has_ids: bool) -> DownloadRow:
    clean = _clean_id(row.id)
    record = DownloadRow(source_id=row.place, text=row.text, label=row.label, id=clean, problem=row.problem)
    if row.url:
        record = record.model_copy(update={"address": shown(row.url)})
    if row.problem:
        return record
    digest = sha256_json([row.url, row.start_s, row.end_s])[:16]
    names = {"source_id": clean, "id": ""} if has_ids else {"source_id": digest}
    return record.model_copy(update={**names, "file": file_stem(row.url), "start_s": row.start_s, "end_s": row.end_s})


def _clean_id(text: str) -> str:
    return neutral(text)[:MAX_ID_LENGTH]


def _missing(table: Table, root: str, *, retry_failed: bool) -> tuple[list[_Task], list[Outcome]]:
    """(what to fetch, files that a killed run left without noting them)."""
    outcomes, there = read_outcomes(root), files_there(root)
    tasks, adopted = [], []
    for stem, url in table.urls.items():
        known = outcomes.get(stem)
        if stem in there:
            if known is None or known.path != there[stem]:
                adopted.append(Outcome(file=stem, path=there[stem]))
        elif known is None or known.path or retry_failed:
            tasks.append(_Task(stem, url))
    return tasks, adopted


class _Fetch:
    """One run over some addresses: threads fetch, the caller's thread notes outcomes and reports."""

    def __init__(
        self, tasks: list[_Task], root: str, folder: Path, config: DownloadConfig, policy: DownloadPolicy
    ) -> None:
        self.root, self.folder, self.policy = root, folder, policy
        self.num_tasks, self.num_threads = len(tasks), min(config.concurrency, len(tasks))
        items = ((host_of(task.url), task) for task in tasks)
        self.queue = HostQueue(items, per_host=config.per_host, delay_s=config.host_delay_s)
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.unnoted: list[Outcome] = []
        self.counts: Counter[str] = Counter()
        self.num_bytes = 0
        self.started = time.monotonic()

    def run(self) -> None:
        """Until every address has its outcome. What a thread raises stops the others, and is raised."""
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="download") as pool:
            try:
                threads = [pool.submit(self._work) for _ in range(self.num_threads)]
                self._watch(threads)
            finally:  # also of Ctrl-C, which must not wait for long downloads
                self.stop.set()
                self.queue.stop()
        self._note(at_least=1)
        self._report()
        for thread in threads:
            thread.result()

    def _watch(self, threads: Sequence[Future[None]]) -> None:
        noted = reported = time.monotonic()
        while wait(threads, timeout=TICK_S).not_done:
            now = time.monotonic()
            if self._note(at_least=1 if now - noted >= FLUSH_S else FLUSH_OUTCOMES):
                noted = now
            if now - reported >= PROGRESS_S:
                reported = now
                self._report()

    def _work(self) -> None:
        is_whole = False
        try:
            while (taken := self.queue.take()) is not None:
                self._attempt(*taken)
            is_whole = True
        finally:
            if not is_whole:
                self.queue.stop()

    def _attempt(self, host: str, task: _Task) -> None:
        incoming = self.folder / task.stem
        try:
            done = download_once(task.url, incoming, self.policy, attempt=task.attempts, stop=self.stop)
        except DownloadError as error:
            if self.stop.is_set():
                return  # given up, not failed
            task.attempts += 1
            if error.retryable and task.attempts < self.policy.max_attempts:
                pause = delay_s(error, self.policy, task.attempts - 1)
                self.queue.again(host, task, after_s=pause, rests=error.retry_after_s is not None)
                return
            outcome = Outcome.parse(
                {"file": task.stem, "reason": error.reason, "message": error.message, "attempts": task.attempts}
            )
        else:
            outcome = self._publish(task, incoming, done)
        with self.lock:
            self.unnoted.append(outcome)
            self.counts[outcome.reason] += 1
            self.num_bytes += outcome.size_bytes
        self.queue.finish(host)

    def _publish(self, task: _Task, incoming: Path, done: Downloaded) -> Outcome:
        path = file_path(task.stem, _suffix(task.url, done.content_type))
        fault_point("ingest.before_download", detail=task.url)
        put_file(incoming, join(self.root, path))
        fault_point("ingest.after_download", detail=task.url)
        return Outcome(
            file=task.stem, path=path, sha256=done.sha256, size_bytes=done.size_bytes, attempts=task.attempts + 1
        )

    def _note(self, *, at_least: int) -> bool:
        with self.lock:
            if len(self.unnoted) < at_least:
                return False
            outcomes, self.unnoted = self.unnoted, []
        add_outcomes(self.root, outcomes)
        return True

    def _report(self) -> None:
        with self.lock:
            counts, num_bytes = self.counts.copy(), self.num_bytes
        done, seconds = sum(counts.values()), time.monotonic() - self.started
        fetched = counts.pop("", 0)
        failed = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())) or "none"
        left = f", about {(self.num_tasks - done) * seconds / done / 60:.0f} min left" if done else ""
        log.info(
            "downloads: %d of %d fetched, failed: %s, %.1f MB/s%s",
            fetched,
            self.num_tasks,
            failed,
            num_bytes / max(seconds, 1e-3) / 1e6,
            left if done < self.num_tasks else "",
        )


def _suffix(url: str, content_type: str) -> str:
    """A name only: what the file holds is found out by its content."""
    with contextlib.suppress(LocationParseError):
        suffix = PurePosixPath(parse_url(url).path or "").suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            return suffix
    return SUFFIX_OF_TYPE.get(content_type, ".mp4")


def _check_failures(table: Table, outcomes: dict[str, Outcome], share: float) -> None:
    """Stop before the plan when too much of the table cannot be used."""
    failed = [("bad_annotation", row.problem) for row in table.rows if row.problem]
    for row in table.rows:
        outcome = outcomes.get(row.file)
        if outcome is not None and outcome.reason:
            failed.append((outcome.reason, outcome.message))
    if not table.rows:
        raise InputError("the table holds no row.", remedy="Expected one address a row below the column names.")
    if len(failed) <= share * len(table.rows):
        return
    counts = Counter(reason for reason, _ in failed)
    reason, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    examples = list(dict.fromkeys(message for kind, message in failed if kind == reason))[:NAMED_EXAMPLES]
    raise TooManyFailuresError(
        f"{len(failed)} of {len(table.rows)} rows failed, more than the allowed share {share:g}; "
        f"mostly {reason} ({count}): {'; '.join(example.rstrip('.') for example in examples)}.",
        remedy="--retry-failed fetches again what failed to come; else mend the table or raise max_failure_share.",
    )


@contextlib.contextmanager
def _sole_user(root: str) -> Iterator[None]:
    """Two runs would fetch everything twice and sweep each other's beginnings; object stores know no locks."""
    if is_remote(root):
        yield
        return
    Path(root).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(root) / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when a process dies
        except BlockingIOError:
            raise InputError(f"another run is downloading into {root}.", remedy="Wait for it, or stop it.") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _incoming(root: str) -> Iterator[Path]:
    """A folder for files that are not complete, on the disk they will stay on; what a killed run left in it goes."""
    if is_remote(root):
        with tempfile.TemporaryDirectory(prefix="foreframe-") as name:
            yield Path(name)
        return
    folder = Path(root) / ".incoming"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
