"""The reader gives back what was stored, trusts the manifest only, and never executes what it reads."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.digests import sha256_file
from infra.errors import DataError, InputError
from ingest.reader import ShardDataset
from ingest.shard import Member
from tests.helpers_data import (
    edit_manifest,
    make_episode_dataset,
    make_frames_dataset,
    moving_square,
    npz,
    write_dataset,
)


@pytest.fixture(scope="module")
def frames_url(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("frames") / "data"
    return make_frames_dataset(folder, num_clips=7, num_frames=12, size=48, clips_per_shard=3, validation_every=3)


def test_frames_are_those_that_were_stored(frames_url):
    dataset = ShardDataset(frames_url)
    assert len(dataset) == 7
    assert dataset.version == sha256_file(Path(frames_url) / "manifest.json")
    assert dataset.shard_sizes == (3, 3, 1)
    for clip in (6, 0, 3):
        record = dataset.record(clip)
        assert record.key == dataset.key(clip) == f"clip-{clip:05d}"
        assert dataset.num_frames(clip) == 12
        order = [11, 0, 5, 5]
        jpegs = dataset.jpegs(clip, order)
        decoded = np.stack([np.array(Image.open(io.BytesIO(data))) for data in jpegs])
        frames = dataset.frames(clip, order)
        assert frames.dtype == np.uint8
        assert np.abs(frames.astype(int) - decoded).max() <= 2  # two decoders of one JPEG
        original = moving_square(12, 48, clip)[order].astype(int)
        assert np.abs(frames - original).mean() < 3


def test_a_split_is_a_view_and_the_rest_is_the_other_split(frames_url):
    train, validation = ShardDataset(frames_url, split="train"), ShardDataset(frames_url, split="validation")
    assert [validation.key(index) for index in range(len(validation))] == ["clip-00000", "clip-00003", "clip-00006"]
    assert [train.key(index) for index in range(len(train))] == [f"clip-{number:05d}" for number in (1, 2, 4, 5)]
    assert train.shard_sizes == (2, 2, 0)
    assert validation.jpegs(1, [2]) == ShardDataset(frames_url).jpegs(3, [2])


def test_source_frame_numbers_follow_the_stride(tmp_path):
    dataset = ShardDataset(make_frames_dataset(tmp_path / "d", num_clips=1, num_frames=5, size=16, stride=3))
    assert dataset.source_frames(0).tolist() == [0, 3, 6, 9, 12]


@pytest.mark.parametrize("layout", ["frames", "video"])
def test_episodes_carry_arrays_text_and_pictures(tmp_path, layout):
    dataset = ShardDataset(make_episode_dataset(tmp_path / "d", num_frames=20, size=48, layout=layout))
    arrays = dataset.arrays(1)
    assert arrays["actions"].shape == (19, 4)
    assert arrays["proprioception"].shape == (20, 4)
    assert dataset.text(1) == "move the square"
    assert dataset.num_frames(1) == 20
    assert dataset.source_frames(1).tolist() == list(range(20))
    frames = dataset.frames(1, [17, 2])
    original = moving_square(20, 48, 1)[[17, 2]].astype(int)
    assert frames.shape == original.shape
    assert np.abs(frames - original).mean() < 6


def test_a_pickled_dataset_opens_its_own_files(frames_url):
    dataset = ShardDataset(frames_url)
    expected = dataset.jpegs(5, [1, 2])
    assert pickle.loads(pickle.dumps(dataset)).jpegs(5, [1, 2]) == expected


def test_only_the_asked_bytes_are_read(frames_url, monkeypatch):
    dataset = ShardDataset(frames_url)
    dataset.jpegs(0, [0])
    sizes = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: sizes.append(length) or pread(fd, length, offset))
    jpegs = dataset.jpegs(0, [3, 9])
    assert sizes == [len(data) for data in jpegs]


def test_a_folder_without_manifest_is_refused_in_one_line(tmp_path, frames_url):
    for path in Path(frames_url).glob("shard-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"holds no manifest\.json") as caught:
        ShardDataset(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_requests_outside_the_data_name_what_there_is(frames_url):
    dataset = ShardDataset(frames_url)
    for call in (
        lambda: dataset.record(7),
        lambda: dataset.jpegs(0, [12]),
        lambda: dataset.frames(0, [-1]),
        lambda: dataset.num_frames(0, "wrist"),
    ):
        with pytest.raises(InputError):
            call()


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0xFF
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "shard-00000.idx", 90),
        lambda folder: flip(folder / "shard-00000.idx", 170),  # a source frame number: only the hash can tell
        lambda folder: (folder / "shard-00000.idx").unlink(),
        lambda folder: (folder / "shard-00000.tar").unlink(),
        lambda folder: os.truncate(folder / "shard-00000.tar", 4096),
        lambda folder: (folder / "shard-00000.idx").write_bytes((folder / "shard-00001.idx").read_bytes()),
        lambda folder: edit_manifest(folder, lambda m: m["receipts"][0].update(tar_bytes=1)),
        lambda folder: edit_manifest(folder, lambda m: m["receipts"][0].update(tar_sha256="0" * 64)),
        lambda folder: edit_manifest(folder, lambda m: m["receipts"][0].update(num_samples=1)),
        lambda folder: edit_manifest(folder, lambda m: m.update(schema_version=99)),
        lambda folder: edit_manifest(folder, lambda m: m.update(surprise=1)),
        lambda folder: (folder / "manifest.json").write_bytes(b"{"),
    ],
)
def test_files_that_disagree_with_the_manifest_are_refused(tmp_path, damage):
    url = make_frames_dataset(tmp_path / "d", num_clips=4, num_frames=3, size=16, clips_per_shard=2)
    damage(Path(url))
    with pytest.raises(DataError):
        ShardDataset(url).jpegs(0, [0])


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def object_array() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, actions=np.array([Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as entry:
        for _ in range(1040):
            entry.write(bytes(1 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [object_array, lambda: pickle.dumps(Bomb()), lambda: b"PK", lambda: b"", zip_bomb])
def test_arrays_are_never_executed_nor_unpacked_without_bound(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    url = make_episode_dataset(tmp_path / "good", num_episodes=1, num_frames=2, size=16)
    stored = ShardDataset(url).record(0)
    members = [Member("json", pretty(stored)), Member("npz", content())]
    dataset = ShardDataset(write_dataset(tmp_path / "bad", 1, 2, lambda _: members))
    with pytest.raises(DataError):
        dataset.arrays(0)
    assert not Path("executed").exists()


def pretty(record) -> bytes:
    return record.model_dump_json().encode()


@pytest.mark.parametrize(
    "record", [b"", b"[]", b"{}", b'{"key": "clip-00000"}', b"\xff", b'{"metadata": 3}', b'{"key": {"a": 1}}']
)
def test_a_record_that_is_none_is_refused(tmp_path, record):
    dataset = ShardDataset(write_dataset(tmp_path / "d", 1, 1, lambda _: [Member("json", record)]))
    with pytest.raises(DataError, match="shard-00000/clip-00000"):
        dataset.record(0)
    with pytest.raises(DataError):
        ShardDataset(dataset.url, split="train")


def test_missing_frames_in_the_middle_are_refused(tmp_path):
    picture = npz({})  # never decoded
    members = [Member("f000000.jpg", picture), Member("f000002.jpg", picture)]
    dataset = ShardDataset(write_dataset(tmp_path / "d", 1, 2, lambda _: members))
    with pytest.raises(DataError, match="not numbered"):
        dataset.num_frames(0)
