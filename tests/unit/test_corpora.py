"""Source layouts: what is listed, with which words and arrays, and what a wrong layout says."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from infra.errors import ConfigError, InputError
from ingest.corpora import annotated, corpus_module, folder, metaworld


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"video")


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_unknown_corpus_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="annotated"):
        corpus_module("anotated")


@pytest.mark.parametrize(
    ("module", "expected"), [(folder, ".mp4"), (annotated, "annotation/SPLIT/NAME.json"), (metaworld, "corpus.json")]
)
def test_wrong_layout_names_the_file_expected(tmp_path, module, expected):
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(InputError) as caught:
        module.list_clips(str(tmp_path))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_folder_takes_words_from_neighbours_and_labels_from_folders(tmp_path):
    touch(tmp_path, "open/b.mp4", "open/a.WEBM", "close/c.mov", ".hidden/d.mp4", "notes.pdf")
    (tmp_path / "open/b.txt").write_text(" open it \n")
    clips = folder.list_clips(str(tmp_path))
    assert [clip.source_id for clip in clips] == ["close/c.mov", "open/a.WEBM", "open/b.mp4"]
    assert [clip.label for clip in clips] == ["close", "open", "open"]
    assert clips[2].text == "open it" and clips[2].videos[0].path == "open/b.mp4"


def test_folder_labels_file_wins_and_must_name_videos(tmp_path):
    touch(tmp_path, "x/a.mp4", "x/b.mp4")
    (tmp_path / "labels.csv").write_text('path,text,label\nx/a.mp4,"lift, slowly",lift\n')
    first, second = folder.list_clips(str(tmp_path))
    assert (first.text, first.label) == ("lift, slowly", "lift")
    assert (second.text, second.label) == ("", "x")
    (tmp_path / "labels.csv").write_text("path,text\nx/gone.mp4,hello\n../out.mp4,hello\n")
    outside, _, _, gone = folder.list_clips(str(tmp_path))
    assert (gone.source_id, gone.videos[0].path) == ("x/gone.mp4", "x/gone.mp4")  # the build finds nothing there
    assert outside.videos == () and "../out.mp4" in outside.problem
    (tmp_path / "labels.csv").write_text("file,text\nx/a.mp4,hello\n")
    with pytest.raises(InputError, match="column 'path'"):
        folder.list_clips(str(tmp_path))


ROWS = [
    {"path": "x/a.mp4", "caption": "lift, slowly", "label": "lift", "split": "val", "start_s": 0.5, "end_s": 2.25},
    {"path": "x/a.mp4", "caption": "put down", "label": None, "split": None, "start_s": 2.25, "end_s": None},
    {"path": "x/b.mp4", "caption": "no span", "label": "odd", "split": "train", "start_s": 3, "end_s": 1},
]


def write_rows(folder: Path, suffix: str) -> None:
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "labels.parquet")
    elif suffix == "json":
        write_json(folder / "labels.json", ROWS)
    elif suffix == "jsonl":
        (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        with (folder / "labels.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_tables_of_every_format_give_the_same_clips(tmp_path, suffix):
    touch(tmp_path, "x/a.mp4", "x/b.mp4")
    write_rows(tmp_path, suffix)
    first, second, third = folder.list_clips(str(tmp_path))
    assert (first.source_id, first.text, first.label) == ("x/a.mp4@0.5-2.25", "lift, slowly", "lift")
    assert (first.start_s, first.end_s, first.metadata) == (0.5, 2.25, {"source_split": "val"})
    assert (second.source_id, second.start_s, second.end_s, second.label) == ("x/a.mp4@2.25-end", 2.25, None, "")
    assert "no span" in third.problem and third.text == "no span"


def test_captions_of_one_span_stay_together(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "labels.csv").write_text("path,text,start_s,end_s\na.mp4,one,,2\na.mp4,two,0.0,2\na.mp4,late,2,3\n")
    first, second = folder.list_clips(str(tmp_path))
    assert (first.text, first.metadata["texts"], first.source_id) == ("one", ["one", "two"], "a.mp4@0-2")
    assert (second.text, second.metadata) == ("late", {})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("labels.csv", b'path,text\na.mp4,"never closed ' + b"x" * 200_000, "no CSV"),
        ("labels.json", b'[{"path": "a.mp4", "text": "\\ud800"}]', "is not JSON"),
        ("labels.json", b"[" * 200_000, "is not JSON"),
        ("labels.json", b"[1]", "no list of objects"),
        ("labels.json", b"[", "is not JSON"),
        ("labels.json", b'[{"path": ["a"]}]', "list in column 'path'"),
        ("labels.parquet", b"PAR1", "no Parquet file"),
        ("labels.csv", b"path\n\xff\n", "not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, name, content, words):
    touch(tmp_path, "a.mp4")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        folder.list_clips(str(tmp_path))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def annotated_root(tmp_path):
    touch(tmp_path, *(f"hand/videos/val/7/{camera}.mp4" for camera in (0, 1, 2)))
    touch(tmp_path, "web/videos/11.webm", "web/videos/12.webm", "web/videos/stray.webm")
    write_json(
        tmp_path / "hand/annotation/val/7.json",
        {
            "texts": ["scoop", "other"],
            "videos": [{"video_path": f"videos/val/7/{camera}.mp4"} for camera in (0, 1)],
            "episode_id": 100,
            "video_length": 5,
            "states": [[0.0, 1.0]] * 5,
            "actions": [[2.0]] * 5,
        },
    )
    write_json(
        tmp_path / "web/annotation/val/11.json",
        {
            "texts": ["poke"],
            "videos": [{"video_path": "videos/11.webm"}],
            "video_length": 99,
            "state": [[0]] * 4,
            "action": [[1]] * 3,
        },
    )
    write_json(tmp_path / "web/annotation/val/12.json", {"texts": [], "videos": [{"video_path": "../../etc/passwd"}]})
    return tmp_path


def test_annotated_layout_and_its_traps(annotated_root):
    clips = {clip.source_id: clip for clip in annotated.list_clips(str(annotated_root))}
    hand, web = clips["hand/val/7"], clips["web/val/11"]
    assert [video.camera for video in hand.videos] == ["0", "1", "2"]  # the JSON lists two
    assert hand.metadata["unlisted_videos"] == ["hand/videos/val/7/2.mp4"]
    assert (hand.text, hand.declared_num_frames, hand.metadata["episode_id"]) == ("scoop", 5, 100)
    assert web.declared_num_frames == 4  # of `state`, whatever video_length says
    assert [video.path for video in web.videos] == ["web/videos/11.webm"]  # its folder is shared: no other cameras
    arrays = annotated.read_trajectory(str(annotated_root), hand)
    assert {name: value.shape for name, value in arrays.items()} == {"proprioception": (5, 2), "actions": (5, 1)}


def test_annotated_lists_what_cannot_be_used(annotated_root):
    """Nothing vanishes: a path out of the corpus, a video without annotation, a JSON that is none."""
    (annotated_root / "web/annotation/val/13.json").write_text("{")
    clips = {clip.source_id: clip for clip in annotated.list_clips(str(annotated_root))}
    assert clips["web/val/12"].problem and clips["web/val/12"].videos == ()
    assert clips["web/val/13"].problem
    assert clips["web/videos/stray.webm"].problem and clips["web/videos/stray.webm"].videos
    assert "web/videos/12.webm" in clips  # its annotation does not name it
    assert len(clips) == 6


def test_annotated_arrays_must_be_rectangular_numbers(annotated_root):
    clip = next(clip for clip in annotated.list_clips(str(annotated_root)) if clip.source_id == "web/val/11")
    for wrong in ([[1], [2, 3]], ["a", "b"], {"a": 1}):
        write_json(annotated_root / clip.trajectory, {"state": wrong})
        with pytest.raises(InputError, match="state"):
            annotated.read_trajectory(str(annotated_root), clip)


def test_metaworld_lists_every_video_with_or_without_sidecars(tmp_path):
    write_json(tmp_path / "corpus.json", {})
    touch(tmp_path, "drawer-open/seed-00000.mp4", "drawer-open/seed-00001.mp4", "drawer-open/planted.mp4")
    for seed in (0, 1):
        record = {"task": "drawer-open", "text": "Open it.", "seed": seed, "num_frames": 3, "render": {"shadow": False}}
        write_json(tmp_path / f"drawer-open/seed-0000{seed}.json", record)
    np.savez(tmp_path / "drawer-open/seed-00000.npz", actions=np.zeros((2, 4)), proprioception=np.ones((3, 4)))
    planted, first, second = metaworld.list_clips(str(tmp_path))
    assert "planted.json is missing" in planted.problem
    assert "seed-00001.npz is missing" in second.problem
    assert (first.problem, first.text, first.label, first.declared_num_frames) == ("", "Open it.", "drawer-open", 3)
    assert first.metadata["render"] == {"shadow": False}
    assert metaworld.read_trajectory(str(tmp_path), first)["actions"].shape == (2, 4)


def test_array_files_are_never_executed():
    class Payload:
        def __reduce__(self):
            return (os.system, ("exit 1",))

    buffer = io.BytesIO()
    np.savez(buffer, actions=np.array([Payload()], dtype=object))
    with pytest.raises(InputError, match="not an array file"):
        metaworld.load_arrays(buffer.getvalue(), "a.npz")
    with pytest.raises(InputError, match="not an array file"):
        metaworld.load_arrays(b"PK\x03\x04 broken", "a.npz")


@pytest.mark.skipif(not os.environ.get("FOREFRAME_CORPUS"), reason="FOREFRAME_CORPUS names no annotated corpus")
def test_real_annotated_corpus(tmp_path):
    root = os.environ["FOREFRAME_CORPUS"]
    clips = annotated.list_clips(root)
    assert clips and not any(clip.problem for clip in clips)
    assert all(clip.text and clip.declared_num_frames for clip in clips)
    for clip in clips:
        if clip.trajectory:
            lengths = {len(array) for array in annotated.read_trajectory(root, clip).values()}
            assert lengths <= {clip.declared_num_frames, clip.declared_num_frames - 1}
    shutil.copytree(root, tmp_path / "moved")
    assert annotated.list_clips(str(tmp_path / "moved")) == clips
