"""Local storage: complete or not there. The same calls on S3 are in tests/integration/test_storage_s3.py."""

import multiprocessing
import pickle
from pathlib import Path

import pytest

from infra import storage
from infra.errors import ConfigError, InputError


def test_create_only_has_one_winner(tmp_path: Path):
    target = tmp_path / "manifest.json"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        won = pool.starmap(storage.create_only, [(str(target), f"writer {index}".encode()) for index in range(16)])
    assert sum(won) == 1
    assert target.read_bytes() == f"writer {won.index(True)}".encode()
    assert storage.list_names(tmp_path) == ["manifest.json"]


def test_a_write_that_dies_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "state.json"
    storage.write_bytes(target, b"old")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("infra.storage.os.fsync", die)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(target, b"new and longer")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_listing_is_sorted_and_hides_unfinished_files(tmp_path: Path):
    for name in ("b.tar", "a.tar", "deep/c.tar", ".x.0.part"):
        storage.write_bytes(tmp_path / name, b"1")
    assert storage.list_names(tmp_path, suffix=".tar") == ["a.tar", "b.tar"]
    assert storage.list_names(tmp_path, suffix=".tar", recursive=True) == ["a.tar", "b.tar", "deep/c.tar"]
    assert storage.list_names(tmp_path / "nowhere") == []


def test_missing_and_unsupported_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"nothing\.bin"):
        storage.read_bytes(tmp_path / "nothing.bin")
    with pytest.raises(InputError, match="gopher"):
        storage.read_bytes("gopher://x/y")
    storage.write_bytes(tmp_path / "bad.json", b"{")
    with pytest.raises(InputError, match="not JSON"):
        storage.read_json(tmp_path / "bad.json")


def test_range_and_folders(tmp_path: Path):
    storage.write_bytes(tmp_path / "from" / "a" / "x.bin", bytes(range(100)))
    assert storage.read_range(tmp_path / "from" / "a" / "x.bin", 10, 5) == bytes(range(10, 15))
    storage.put_folder(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to" / "a" / "x.bin").read_bytes() == bytes(range(100))


def test_errors_cross_process_borders_whole():
    error = pickle.loads(pickle.dumps(ConfigError("lr = -1 is negative.", remedy="Give a positive lr.")))
    assert (type(error), str(error)) == (ConfigError, "lr = -1 is negative. Give a positive lr.")
