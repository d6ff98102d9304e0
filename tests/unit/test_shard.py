"""Shards and their index: readable by anybody's tar reader, deterministic, and refused when damaged."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from infra.digests import sha256_file
from infra.errors import DataError
from ingest.index import ShardIndex
from ingest.shard import Member, ShardWriter, index_path, iter_members

SUFFIXES = ("json", "txt", "npz", "main.mp4", *(f"f{number:06d}.jpg" for number in range(5)))
SAMPLES = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True),
    st.dictionaries(st.sampled_from(SUFFIXES), st.binary(max_size=1500), min_size=1, max_size=4),
    max_size=5,
)


def write(folder: Path, samples: dict[str, dict[str, bytes]], name: str = "shard-00000") -> Path:
    path = folder / f"{name}.tar"
    with ShardWriter(path) as writer:
        for key, members in samples.items():
            writer.add(key, [Member(suffix, data, number) for number, (suffix, data) in enumerate(members.items())])
    return path


@given(SAMPLES)
def test_every_reader_finds_the_same_bytes(tmp_path_factory, samples):
    path = write(tmp_path_factory.mktemp("shard"), samples)
    expected = [(f"{key}.{suffix}", data) for key, members in samples.items() for suffix, data in members.items()]

    with tarfile.open(path, "r:") as tar:
        entries = tar.getmembers()
        assert [(entry.name, tar.extractfile(entry).read()) for entry in entries] == expected
        assert {(entry.mtime, entry.uid, entry.gid, entry.mode) for entry in entries} <= {(0, 0, 0, 0o644)}

    members = list(iter_members(path))
    assert [(f"{member.key}.{member.suffix}", member.data) for member in members] == expected

    index = ShardIndex(index_path(path))
    assert index.tar_sha256 == sha256_file(path)
    raw = path.read_bytes()
    for sample, (key, contents) in enumerate(samples.items()):
        assert index.keys[sample] == key
        for number, (suffix, data) in enumerate(contents.items()):
            row = index.find(sample, suffix)
            offset, length = int(index.offsets[row]), int(index.lengths[row])
            assert raw[offset : offset + length] == data
            assert index.source_frames[row] == number
        assert index.find(sample, "absent.json") is None


def test_webdataset_yields_the_same_samples(tmp_path):
    samples = {f"clip-{n}": {"json": b"{}", "f000000.jpg": bytes([n]) * 700, "main.mp4": b"v"} for n in range(3)}
    path = write(tmp_path, samples)
    found = {
        item["__key__"]: {key: value for key, value in item.items() if not key.startswith("__")}
        for item in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    assert found == samples


def test_equal_content_gives_equal_bytes(tmp_path):
    samples = {"a": {"json": b"{}", "f000000.jpg": b"x" * 513}}
    first, second = write(tmp_path, samples), write(tmp_path, samples, "shard-00001")
    assert first.read_bytes() == second.read_bytes()
    assert index_path(first).read_bytes() == index_path(second).read_bytes()


@pytest.mark.parametrize(
    ("key", "suffixes"),
    [
        ("../evil", ["json"]),
        ("/abs", ["json"]),
        ("dot.ted", ["json"]),
        ("new\nline", ["json"]),
        ("", ["json"]),
        ("ok", ["pkl"]),
        ("ok", ["json.pkl"]),
        ("ok", ["a/b.json"]),
        ("ok", ["json", "json"]),
        ("ok", []),
        ("k" * 64, ["c" * 40 + ".mp4"]),
    ],
)
def test_bad_names_are_refused_before_a_byte_is_written(tmp_path, key, suffixes):
    with ShardWriter(tmp_path / "s.tar") as writer:
        with pytest.raises(DataError):
            writer.add(key, [Member(suffix, b"x") for suffix in suffixes])
        writer.add("good", [Member("json", b"{}")])
    assert [member.key for member in iter_members(tmp_path / "s.tar")] == ["good"]


def test_a_repeated_key_is_refused(tmp_path):
    with ShardWriter(tmp_path / "s.tar") as writer:
        writer.add("a", [Member("json", b"{}")])
        with pytest.raises(DataError, match="'a'"):
            writer.add("a", [Member("json", b"{}")])


def test_a_failed_build_leaves_no_files(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "s.tar") as writer:
        writer.add("a", [Member("json", b"{}")])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    raw = write(tmp_path, {"a": {"json": b"x" * 600, "txt": b""}, "b": {"json": b"y"}}).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in {*range(0, len(raw), 128), len(raw) - 1}:
        cut.write_bytes(raw[:length])
        with pytest.raises(DataError):
            list(iter_members(cut))
    cut.write_bytes(raw + bytes(512))
    with pytest.raises(DataError):
        list(iter_members(cut))


def foreign_tar(path: Path, *entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    """Written by the standard library with our header constants, so that only the named oddity differs."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size, entry.mode = kind, link, len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    raw = path.read_bytes()
    path.write_bytes(raw[: tarfile_end(raw)])


def tarfile_end(raw: bytes) -> int:
    return len(raw.rstrip(b"\0")) + (-len(raw.rstrip(b"\0")) % 512) + 1024


@pytest.mark.parametrize(
    ("entries", "options"),
    [
        ([("../evil.txt", b"x")], {}),
        ([("/abs.txt", b"x")], {}),
        ([("a.pkl", b"x")], {}),
        ([("a.txt", b"x"), ("a.txt", b"x")], {}),
        ([("a.txt", b"x"), ("b.txt", b"x"), ("a.json", b"x")], {}),
        ([("a.txt", b"")], {"kind": tarfile.SYMTYPE, "link": "/etc/passwd"}),
        ([("a.txt", b"")], {"kind": tarfile.LNKTYPE, "link": "b.txt"}),
        ([("a.txt", b"")], {"kind": tarfile.CHRTYPE}),
        ([("a.txt", b"")], {"kind": tarfile.DIRTYPE}),
    ],
)
def test_hostile_members_are_refused(tmp_path, entries, options):
    foreign_tar(tmp_path / "s.tar", *entries, **options)
    with pytest.raises(DataError):
        list(iter_members(tmp_path / "s.tar"))


def test_the_same_tar_of_regular_members_is_accepted(tmp_path):
    foreign_tar(tmp_path / "s.tar", ("a.txt", b"x"), ("b.txt", b"y"))
    assert [member.data for member in iter_members(tmp_path / "s.tar")] == [b"x", b"y"]


@given(st.data())
def test_a_damaged_index_never_points_outside_its_tar(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("index")
    tar = write(folder, {"a": {"json": b"{}", "f000000.jpg": b"x" * 600}, "b": {"txt": b"yy"}})
    raw = bytearray(index_path(tar).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2, len(raw) - 1]))]
    damaged = folder / "damaged.idx"
    damaged.write_bytes(raw)
    try:
        index = ShardIndex(damaged)
    except DataError:
        return
    assert all(
        int(start) + int(length) <= index.tar_bytes for start, length in zip(index.offsets, index.lengths, strict=True)
    )
    for sample in range(index.num_samples):
        rows = index.members_of(sample)
        assert 0 <= rows.start <= rows.stop <= index.num_members
        assert all(index.suffix(row) for row in range(rows.start, rows.stop))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, b"X", "starts with"),
        (8, b"\x02", "version"),
        (12, b"\x09", "counts"),
        (72, b"\x01", "block"),
        (74, b"\x01", "outside"),
        (88, b"\xe8\x03", "overlap"),  # the first length, 1000: into the second header
        (104, b"\x09", "suffix id"),
        (112, b"\xff", "key"),
    ],
)
def test_an_index_says_what_is_wrong_with_it(tmp_path, position, value, message):
    path = index_path(write(tmp_path, {"a": {"json": b"{}", "txt": b"x"}}))
    raw = bytearray(path.read_bytes())
    raw[position : position + len(value)] = value
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        ShardIndex(path)
