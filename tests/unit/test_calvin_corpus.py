"""CALVIN's files as numpy writes them, and hostile pickles in their place."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import InputError
from infra.media_pictures import join_pictures
from ingest.corpora import calvin, corpus_module
from ingest.corpora.metaworld import load_arrays
from ingest.corpora.pickled import load_object

SPANS = {"training": [(358482, 358487), (358490, 358492)], "validation": [(0, 3)]}
NPY = np.lib.format.magic(1, 0) + struct.pack("<H", 118)
HEADER = NPY + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"


def frame(index: int) -> dict[str, np.ndarray]:
    """One frame as CALVIN stores it; every number tells its index."""
    return {
        "rgb_static": np.full((20, 20, 3), (index % 251, 10, 20), np.uint8),
        "rgb_gripper": np.full((8, 8, 3), (5, index % 251, 7), np.uint8),
        "rgb_tactile": np.zeros((16, 12, 6), np.uint8),
        "depth_static": np.zeros((20, 20), np.float32),
        "actions": np.arange(7) + index / 1000,
        "rel_actions": np.linspace(-1, 1, 7) * (index % 5),
        "robot_obs": np.full(15, index / 1000),
        "scene_obs": np.zeros(24),
    }


def annotations(spans: list[tuple[int, int]], number: type = int) -> dict[str, object]:
    """The record that is pickled; its spans are numpy's integers in some releases."""
    return {
        "language": {
            "ann": [f"open the drawer {start}" for start, _ in spans],
            "task": ["open_drawer" for _ in spans],
            "emb": np.zeros((len(spans), 1, 384), np.float32),
        },
        "info": {"episodes": [], "indx": [(number(start), number(end)) for start, end in spans]},
    }


@pytest.fixture
def root(tmp_path: Path) -> str:
    for split, spans in SPANS.items():
        folder = tmp_path / "task_D_D" / split
        (folder / "lang_annotations").mkdir(parents=True)
        for start, end in spans:
            for index in range(start, end + 1):
                np.savez_compressed(folder / f"episode_{index:07d}.npz", **frame(index))
        np.save(folder / "lang_annotations/auto_lang_ann.npy", annotations(spans))
        # The same sentences in other embeddings, as in the download: no further clips.
        (folder / "lang_all-MiniLM-L6-v2").mkdir()
        np.save(folder / "lang_all-MiniLM-L6-v2/auto_lang_ann.npy", annotations(spans))
        np.save(folder / "ep_start_end_ids.npy", np.asarray(spans))
    return str(tmp_path)


def table(root: str, split: str = "training") -> Path:
    return Path(root) / "task_D_D" / split / "lang_annotations/auto_lang_ann.npy"


def test_every_annotation_is_a_clip(root: str) -> None:
    clips = corpus_module("calvin").list_clips(root)
    assert [clip.source_id for clip in clips] == [
        "task_D_D/training/00000-open_drawer", "task_D_D/training/00001-open_drawer",
        "task_D_D/validation/00000-open_drawer",
    ]  # fmt: skip
    assert [clip.declared_num_frames for clip in clips] == [6, 3, 4]  # the last frame is part of it
    assert [clip.metadata["source_split"] for clip in clips] == ["training", "training", "validation"]
    first = clips[0]
    assert (first.text, first.label, first.metadata["task"]) == ("open the drawer 358482", "open_drawer", "open_drawer")
    assert first.metadata["indices"] == [358482, 358487] and not first.problem
    assert [(video.camera, video.path, video.pictures) for video in first.videos] == [
        ("static", "task_D_D/training/episode_0358482.npz#rgb_static", True),
        ("gripper", "task_D_D/training/episode_0358482.npz#rgb_gripper", True),
    ]


def test_a_split_folder_can_be_the_root(root: str) -> None:
    clips = calvin.list_clips(f"{root}/task_D_D/validation")
    assert [clip.source_id for clip in clips] == ["00000-open_drawer"] and "source_split" not in clips[0].metadata
    assert calvin.read_trajectory(f"{root}/task_D_D/validation", clips[0])["actions"].shape == (4, 7)


def test_arrays_are_of_the_clips_frames(root: str) -> None:
    for clip in calvin.list_clips(root):
        start, end = clip.metadata["indices"]
        indices = np.arange(start, end + 1)
        arrays = calvin.read_trajectory(root, clip)
        assert {name: (values.shape, values.dtype.name) for name, values in arrays.items()} == {
            "actions": ((len(indices), 7), "float32"),
            "proprioception": ((len(indices), 15), "float32"),
            "absolute_actions": ((len(indices), 7), "float32"),
        }
        np.testing.assert_array_equal(arrays["actions"][:, 6], indices % 5)
        np.testing.assert_allclose(arrays["proprioception"][:, 14], indices / 1000, rtol=1e-6)
        np.testing.assert_allclose(arrays["absolute_actions"][:, 6], 6 + indices / 1000, rtol=1e-6)


def test_pictures_are_of_the_clips_frames(root: str, tmp_path: Path) -> None:
    clip = calvin.list_clips(root)[1]
    for video, channel, size in zip(clip.videos, (0, 1), (20, 8), strict=True):
        pictures = calvin.read_pictures(root, clip, video)
        frames = [np.asarray(picture) for picture in pictures.frames]
        assert pictures.fps == 30 and [picture.shape for picture in frames] == [(size, size, 3)] * 3
        assert [int(picture[0, 0, channel]) for picture in frames] == [index % 251 for index in range(358490, 358493)]
        assert join_pictures(calvin.read_pictures(root, clip, video), tmp_path / "joined.mov")


def test_pictures_do_not_unpack_depth(root: str) -> None:
    """Depth that cannot be unpacked does not matter: nobody asks for it."""
    clip = calvin.list_clips(root)[1]
    place = Path(root) / clip.trajectory
    with zipfile.ZipFile(place) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(place, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:90] if name == "depth_static.npy" else content)
    assert len(list(calvin.read_pictures(root, clip, clip.videos[0]).frames)) == 3
    with pytest.raises(InputError, match="not an array file"):
        load_arrays(place.read_bytes(), "a.npz")


def test_the_first_missing_frame_is_named(root: str) -> None:
    (Path(root) / "task_D_D/training/episode_0358485.npz").unlink()
    (Path(root) / "task_D_D/training/episode_0358486.npz").unlink()
    broken, whole, _ = calvin.list_clips(root)
    assert broken.problem == "task_D_D/training/episode_0358485.npz is missing" and not broken.videos
    assert broken.text and not whole.problem
    (Path(root) / "task_D_D/training/episode_0358492.npz").unlink()  # the last of its clip
    assert "episode_0358492.npz is missing" in calvin.list_clips(root)[1].problem


def test_a_frame_that_is_broken_after_planning_is_named(root: str) -> None:
    clip = calvin.list_clips(root)[1]
    place = Path(root) / "task_D_D/training/episode_0358491.npz"
    content = place.read_bytes()
    arrays = frame(358491)
    for broken, words in (
        (content[: len(content) // 2], "is not an array file"),
        (saved(arrays | {"rel_actions": np.zeros(8), "rgb_static": np.zeros((4, 4), np.uint8)}), "of shape"),
        (saved({"rgb_gripper": arrays["rgb_gripper"]}), "holds no array"),
        (
            saved(arrays | {key: np.array([{}], object) for key in ("rel_actions", "rgb_static")}),
            "is not an array file",
        ),
    ):
        place.write_bytes(broken)
        with pytest.raises(InputError, match=r"episode_0358491\.npz.*" + words):
            calvin.read_trajectory(root, clip)
        with pytest.raises(InputError, match=r"episode_0358491\.npz.*" + words):
            list(calvin.read_pictures(root, clip, clip.videos[0]).frames)


def saved(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


def test_damaged_compression_and_shapes_no_memory_holds_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, rgb_static=np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = bytearray(buffer.getvalue())
    data[200:260] = bytes(60)
    with pytest.raises(InputError, match="not an array file"):
        load_arrays(bytes(data), "a.npz", ["rgb_static"])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rgb_static.npy", b"no array")
    with pytest.raises(InputError, match="'rgb_static' is no array"):
        load_arrays(buffer.getvalue(), "a.npz")
    huge = NPY + b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,), }".ljust(117) + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rgb_static.npy", huge)
    with pytest.raises(InputError, match="not an array file"):
        load_arrays(buffer.getvalue(), "a.npz")


def test_another_folder_names_the_file_expected(tmp_path: Path) -> None:
    np.savez(tmp_path / "episode_0000000.npz", **frame(0))
    with pytest.raises(InputError, match=r"holds no lang_annotations/auto_lang_ann\.npy") as caught:
        calvin.list_clips(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "words"), [
    ({"language": {}}, "has no list 'language', 'ann'"),
    ({"language": None}, "has no list 'language', 'ann'"),
    ({"info": {"indx": "0"}}, "has no list 'info', 'indx'"),
    ({"info": {"indx": [(0, 3)]}}, "different numbers of sentences, tasks and spans: 2, 2, 1"),
])  # fmt: skip
def test_annotations_without_their_lists_are_refused(root: str, change: dict[str, object], words: str) -> None:
    np.save(table(root), annotations(SPANS["training"]) | change)
    with pytest.raises(InputError, match=words):
        calvin.list_clips(root)


@pytest.mark.parametrize("span", [(3, 0), (-1, 2), (0, 10**13), (0,), "03", None, (0.0, 3.0), (0, 10**5000)])
def test_an_annotation_of_no_span_is_that_clips_problem(root: str, span: object) -> None:
    record = annotations(SPANS["validation"] * 2)
    record["info"] = {"indx": [span, (0, 3)]}
    np.save(table(root, "validation"), record)
    broken, whole = calvin.list_clips(root)[2:]
    assert "first and last frame" in broken.problem and not broken.videos and not whole.problem


@pytest.mark.parametrize("key", ["ann", "task"])
@pytest.mark.parametrize("value", ["half \ud800", None, b"open"])
def test_words_that_are_no_text_are_that_clips_problem(root: str, key: str, value: object) -> None:
    record = annotations(SPANS["validation"] * 2)
    record["language"] = record["language"] | {key: [value, "close_drawer"]}
    np.save(table(root, "validation"), record)
    broken, whole = calvin.list_clips(root)[2:]
    assert "no sentence, task" in broken.problem and not whole.problem


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("number", [int, np.int64, np.int32])
def test_every_protocol_numpy_wrote_is_read(root: str, protocol: int, number: type) -> None:
    expected = calvin.list_clips(root)
    record = annotations(SPANS["training"], number)
    record["info"] = {"indx": np.asarray(SPANS["training"])} if number is np.int32 else record["info"]
    body = pickle.dumps(np.array(record, object), protocol)
    table(root).write_bytes(HEADER + body)
    assert calvin.list_clips(root) == expected
    if protocol < 4:  # names as numpy 1 has them; in protocol 4 their length stands before them
        old = body.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        assert old != body
        table(root).write_bytes(HEADER + old)
        assert calvin.list_clips(root) == expected


class Payload:
    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return (self.call, self.arguments)


def pickled(value: object, protocol: int = 4) -> bytes:
    return HEADER + pickle.dumps(value, protocol)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_forbidden_name_is_refused_and_not_called(root: str, tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    array = np.array({"language": Payload(os.mkdir, str(trace))}, object)
    table(root).write_bytes(pickled(array, protocol))
    with pytest.raises(InputError, match=r"would call 'posix\.mkdir'") as caught:
        calvin.list_clips(root)
    assert not trace.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize(("body", "words"), [
    (b"cbuiltins\neval\n(V1\ntR.", "would call 'builtins.eval'"),
    (b"cnumpy\nload\n(Vx\ntR.", "would call 'numpy.load'"),
    (b"cnumpy.core.multiarray\nfromstring\n.", "would call 'numpy.core.multiarray.fromstring'"),
    (b"ios\nsystem\n(Vx\ntR.", "instruction INST"),
    (b"(cnumpy\nndarray\no.", "instruction OBJ"),
    (b"cnumpy\nndarray\n)\x81.", "instruction NEWOBJ"),
    (b"\x82\x01.", "instruction EXT1"),
    (b"Pname\n.", "instruction PERSID"),
    (b"\x96" + struct.pack("<Q", 3) + b"abc.", "instruction BYTEARRAY8"),
    (b"Nr" + struct.pack("<I", 1 << 31) + b".", "claims 2147483648 objects"),
    (b"\x8e" + struct.pack("<Q", 1 << 40) + b"abc.", "is no pickled numpy file"),
    (b"N.", "holds no single object"),
    (b"", "is no pickled numpy file"),
    (b"garbage", "is no pickled numpy file"),
    # What the stand-ins do not take: their attributes set, a type of objects filled with bytes, odd encodings.
    (b"cnumpy\ndtype\n}b.", "is no pickled numpy file"),
    (b"cnumpy\ndtype\n(VO8\ntR}b.", "is no pickled numpy file"),
    (b"cnumpy\ndtype\n(VV8\ntR.", "is no pickled numpy file"),
    (b"c_codecs\nencode\n(Vx\nVzip\ntR.", "is no pickled numpy file"),
    (b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(VO8\ntRC\x08aaaaaaaatR.", "is no pickled numpy file"),
])  # fmt: skip
def test_what_plain_data_do_not_need_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_object(HEADER + body, "a.npy")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_other_numpy_files_are_refused(root: str) -> None:
    for content, words in (
        (np.zeros(3), "holds float64 of shape (3,), not one pickled object"),
        (np.array([{}, {}], object), "holds object of shape (2,)"),
    ):
        np.save(table(root), content)
        with pytest.raises(InputError) as caught:
            calvin.list_clips(root)
        assert words in str(caught.value)
    for data in (b"", b"\x93NUMPY\x03\x00", HEADER[:40], b"PK\x03\x04"):
        table(root).write_bytes(data)
        with pytest.raises(InputError, match="is no pickled numpy file"):
            calvin.list_clips(root)


GOOD = pickle.dumps(np.array(annotations([(0, 3)], np.int64), object), 3)


@given(st.integers(0, 700), st.integers(0, 255))
def test_a_pickle_with_one_other_byte_is_read_or_refused(place: int, value: int) -> None:
    data = bytearray(GOOD)
    data[place % len(data)] = value
    try:
        load_object(HEADER + bytes(data), "a.npy")
    except InputError as error:
        assert "\n" not in error.message
