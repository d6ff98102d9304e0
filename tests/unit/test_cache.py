"""The shard cache: one download per node, hashes checked, least recently used out first, safe between processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

import ingest.cache
from infra.digests import sha256_bytes
from infra.errors import DataError, InputError
from ingest.cache import ShardCache


def store(folder: Path, count: int, size: int = 100) -> list[tuple[str, str]]:
    """(url, sha256) of `count` files of a store."""
    entries = []
    for number in range(count):
        data = bytes([number]) * size
        (folder / f"{number}.tar").write_bytes(data)
        entries.append((str(folder / f"{number}.tar"), sha256_bytes(data)))
    return entries


def test_the_second_fetch_needs_no_store(tmp_path):
    [(url, digest)] = store(tmp_path, 1)
    cache = ShardCache(tmp_path / "cache", quota_bytes=1000)
    first = cache.fetch(url, sha256=digest)
    Path(url).unlink()
    assert cache.fetch(url, sha256=digest) == first
    assert first.read_bytes() == bytes(100)


def test_the_least_recently_used_goes_first_and_the_quota_holds(tmp_path):
    entries = store(tmp_path, 4)
    cache = ShardCache(tmp_path / "cache", quota_bytes=300)
    paths = []
    for url, digest in entries[:3]:
        paths.append(cache.fetch(url, sha256=digest))
        time.sleep(0.01)
    cache.fetch(entries[0][0], sha256=entries[0][1])
    cache.fetch(entries[3][0], sha256=entries[3][1])
    assert [path.exists() for path in paths] == [True, False, True]
    kept = [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert sum(path.stat().st_size for path in kept) == 300


def test_an_evicted_shard_stays_readable_where_it_is_open(tmp_path):
    entries = store(tmp_path, 2)
    cache = ShardCache(tmp_path / "cache", quota_bytes=100)
    descriptor = cache.open(entries[0][0], sha256=entries[0][1])
    cache.fetch(entries[1][0], sha256=entries[1][1])
    assert not (cache.folder / entries[0][1]).exists()
    assert os.pread(descriptor, 100, 0) == bytes(100)
    os.close(descriptor)


def test_wrong_content_is_refused_and_not_kept(tmp_path):
    [(url, _)] = store(tmp_path, 1)
    cache = ShardCache(tmp_path / "cache", quota_bytes=1000)
    with pytest.raises(DataError, match="sha256"):
        cache.fetch(url, sha256="0" * 64)
    assert [path for path in cache.folder.iterdir() if path.suffix != ".lock"] == []


def test_a_shard_larger_than_the_quota_is_refused_before_it_is_fetched(tmp_path):
    [(url, digest)] = store(tmp_path, 1)
    with pytest.raises(InputError, match="FOREFRAME_CACHE_BYTES"):
        ShardCache(tmp_path / "cache", quota_bytes=99).fetch(url, sha256=digest, size_bytes=100)


def test_abandoned_downloads_are_removed(tmp_path):
    [(url, digest)] = store(tmp_path, 1)
    cache = ShardCache(tmp_path / "cache", quota_bytes=1000)
    cache.folder.mkdir()
    abandoned = cache.folder / ".x.incoming.0.part"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    cache.fetch(url, sha256=digest)
    assert not abandoned.exists()


def _fetch_all(folder: Path, entries: list[tuple[str, str]], failures: multiprocessing.Queue) -> None:
    cache = ShardCache(folder, quota_bytes=10_000)
    for url, digest in entries:
        if sha256_bytes(cache.fetch(url, sha256=digest).read_bytes()) != digest:
            failures.put(url)


def test_processes_share_one_download(tmp_path, monkeypatch):
    entries = store(tmp_path, 3)
    journal = tmp_path / "journal"

    def slow_copy(url: str, local: Path) -> None:
        with journal.open("a") as stream:
            stream.write(f"{url}\n")
        time.sleep(0.1)
        shutil.copyfile(url, local)

    monkeypatch.setattr(ingest.cache, "get_file", slow_copy)
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    processes = [context.Process(target=_fetch_all, args=(tmp_path / "cache", entries, failures)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert failures.empty()
    assert sorted(journal.read_text().split()) == sorted(url for url, _ in entries)


def test_a_link_stays_when_the_cache_needs_the_room(tmp_path):
    contents = {name: name.encode() * 100 for name in ("a", "b")}
    digests = {name: sha256_bytes(data) for name, data in contents.items()}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    cache = ShardCache(tmp_path / "cache", quota_bytes=150)
    mine = cache.folder_for_links()
    linked = cache.link(str(tmp_path / "a"), sha256=digests["a"], folder=mine)
    cache.fetch(str(tmp_path / "b"), sha256=digests["b"])
    assert not (tmp_path / "cache" / digests["a"]).exists() and linked.read_bytes() == contents["a"]
