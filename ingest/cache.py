"""Whole shards of `s3://` data sets on the local disk: hashed, bounded, shared by all processes of a node.

Ranged reads of single frames from an object store cost many times their decoding, so a shard comes whole, once per
node. Files are named by their sha256; a file that is there is complete and was verified.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from infra.digests import sha256_file
from infra.errors import DataError, InputError, StorageError
from infra.storage import get_file

NUM_FETCH_LOCKS = 64  # a fixed set: lock files are never removed, which no protocol does safely
MAX_OPEN_ATTEMPTS = 5
ABANDONED_AFTER_S = 24 * 3600


class ShardCache:
    """Least recently used files below `folder`, at most `quota_bytes` of them (downloads in flight come on top)."""

    def __init__(self, folder: Path, *, quota_bytes: int) -> None:
        self.folder = folder
        self.quota_bytes = quota_bytes

    def open(self, url: str, *, sha256: str, size_bytes: int | None = None) -> int:
        """A read-only file descriptor of the cached content; it stays readable if the file is evicted meanwhile."""
        for _ in range(MAX_OPEN_ATTEMPTS):
            path = self.fetch(url, sha256=sha256, size_bytes=size_bytes)
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process needed the room just now
                continue
        raise self._crowded(url)

    def _crowded(self, url: str) -> StorageError:
        return StorageError(
            f"{url} was evicted from {self.folder} {MAX_OPEN_ATTEMPTS} times before it could be opened.",
            remedy="Raise FOREFRAME_CACHE_BYTES: it holds too few shards for the processes of this node.",
        )

    def link(self, url: str, *, sha256: str, folder: Path) -> Path:
        """A hard link to the cached content in `folder`, of this file system; it stays if the file is evicted."""
        for _ in range(MAX_OPEN_ATTEMPTS):
            target = folder / sha256
            try:
                os.link(self.fetch(url, sha256=sha256), target)
            except FileNotFoundError:  # another process needed the room just now
                continue
            return target
        raise self._crowded(url)

    def folder_for_links(self) -> Path:
        """A folder on the cache's file system, beside it."""
        place = self.folder.with_name(f"{self.folder.name}-links")
        place.mkdir(parents=True, exist_ok=True)
        return place

    def fetch(self, url: str, *, sha256: str, size_bytes: int | None = None) -> Path:
        """The local path of `url`, downloaded unless present; `DataError` if the content is not `sha256`."""
        target = self.folder / sha256
        if self._touch(target):
            return target
        if size_bytes is not None and size_bytes > self.quota_bytes:
            raise InputError(
                f"{url} has {size_bytes} bytes, the shard cache holds {self.quota_bytes}.",
                remedy="Raise FOREFRAME_CACHE_BYTES.",
            )
        with self._lock(f"fetch-{int(sha256[:8], 16) % NUM_FETCH_LOCKS:02d}"):
            if self._touch(target):  # another process was quicker
                return target
            self._download(url, target, sha256)
        return target

    def _download(self, url: str, target: Path, sha256: str) -> None:
        incoming = target.with_name(f"{target.name}.incoming")
        try:
            get_file(url, incoming)
            found = sha256_file(incoming)
            if found != sha256:
                raise DataError(
                    f"{url} has sha256 {found}, its manifest says {sha256}.", remedy="The store's copy is damaged."
                )
            with self._lock("evict"):
                self._make_room(incoming.stat().st_size)
                incoming.replace(target)
        finally:
            incoming.unlink(missing_ok=True)

    def _make_room(self, incoming_bytes: int) -> None:
        entries = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if not path.suffix:
                    entries.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix != ".lock" and time.time() - status.st_mtime > ABANDONED_AFTER_S:
                    path.unlink()  # the download of a process that was killed
        used = sum(size for _, size, _ in entries) + incoming_bytes
        for _, size, path in sorted(entries):
            if used <= self.quota_bytes:
                return
            path.unlink(missing_ok=True)
            used -= size

    @staticmethod
    def _touch(path: Path) -> bool:
        """Mark as just used; False when it is not there."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # released by the kernel when a process dies
            yield
        finally:
            os.close(descriptor)
