"""Kinetics-400 and Something-Something v2 as people have them on disk, label files as published."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import InputError
from ingest.corpora import kinetics400, something_something_v2
from ingest.job import run
from ingest.reader import ShardDataset
from ingest.recipe import IngestConfig, Recipe
from tests.helpers_media import make_video

# Rows of the published files; the second video is gone, as many are.
KINETICS_ROWS = """label,youtube_id,time_start,time_end,split,is_cc
testifying,---QUuC4vJs,1,3,train,0
eating spaghetti,--3ouPhoy2A,0,2,train,0
"bending back, slowly",-3B32lodo2M,2,4,train,0
"""
SOMETHING_TRAIN = """[
{"id":"78687","label":"holding potato next to vicks vaporub bottle",
 "template":"Holding [something] next to [something]","placeholders":["potato","vicks vaporub bottle"]},
{"id":"42326","label":"spreading margarine onto bread",
 "template":"Spreading [something] onto [something]","placeholders":["margarine","bread"]}
]"""


def test_kinetics_in_class_folders_has_classes_and_splits(tmp_path: Path) -> None:
    for name in ("train/eating_spaghetti/a_000001_000011.mp4", "val/abseiling/b.mp4"):
        make_video(tmp_path / name)
    train, val = kinetics400.list_clips(str(tmp_path))
    assert (train.label, train.text, train.metadata) == (
        "eating spaghetti", "eating spaghetti", {"source_split": "train"},
    )  # fmt: skip
    assert (val.label, val.metadata["source_split"], val.start_s) == ("abseiling", "val", None)


def test_kinetics_rows_find_cut_clips_and_spans_of_whole_videos(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/train.csv").write_text(KINETICS_ROWS)
    make_video(tmp_path / "cut/---QUuC4vJs_000001_000003.mp4", frames=20, fps=10)
    make_video(tmp_path / "whole/-3B32lodo2M.mp4", frames=50, fps=10, size="64x64")
    output = str(tmp_path / "out")
    recipe = Recipe(layout="video", max_failure_share=0.5)
    manifest = run(
        IngestConfig(corpus="kinetics400", source=str(tmp_path), output=output, name="k", recipe=recipe, workers=0)
    )
    data = ShardDataset(output, split=None)
    stored = {data.record(place).source_id: place for place in range(len(data))}
    assert sorted(stored) == ["---QUuC4vJs_000001_000003", "-3B32lodo2M_000002_000004"]
    whole = stored["-3B32lodo2M_000002_000004"]
    assert data.record(whole).label == "bending back, slowly"
    assert data.num_frames(whole) == 2 * 10 and data.record(whole).start_s == pytest.approx(2, abs=0.05)
    (gone,) = [failure for receipt in manifest.receipts for failure in receipt.failures]
    assert (gone.source_id, gone.reason) == ("--3ouPhoy2A_000000_000002", "not_found")


@pytest.mark.parametrize(("rows", "words"), [
    ("path,text\na.mp4,x\n", "has columns path, text"),
    ("", "has columns none"),
])  # fmt: skip
def test_another_table_is_named(tmp_path: Path, rows: str, words: str) -> None:
    (tmp_path / "train.csv").write_text(rows)
    with pytest.raises(InputError, match=words):
        kinetics400.list_clips(str(tmp_path))


@pytest.mark.parametrize("row", ["---QUuC4vJs,one,3", "---QUuC4vJs,nan,3", "---QUuC4vJs,3,1", "../outside,1,3", ",1,3"])
def test_a_row_of_no_span_is_a_refused_clip_not_a_refused_corpus(tmp_path: Path, row: str) -> None:
    make_video(tmp_path / "outside_000001_000003.mp4")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "train.csv").write_text(KINETICS_ROWS.replace("---QUuC4vJs,1,3", row))
    clips = {clip.source_id: clip for clip in kinetics400.list_clips(str(corpus))}
    refused = clips[row.replace(",", "_")]
    assert len(clips) == 3 and "no video's span" in refused.problem
    assert not refused.videos  # nothing outside the corpus is ever opened


def test_something_something_has_sentences_classes_and_placeholders(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "train.json").write_text(SOMETHING_TRAIN)
    (labels / "test.json").write_text('[{"id":"1420"}]')
    (labels / "labels.json").write_text('{"Holding [something]":"0"}')  # the classes: no label file of a split
    for name in ("78687", "1420", "999"):
        make_video(tmp_path / f"20bn-something-something-v2/{name}.mp4")
    clips = {clip.source_id: clip for clip in something_something_v2.list_clips(str(tmp_path))}
    known = clips["78687"]
    assert known.text == "holding potato next to vicks vaporub bottle"
    assert known.label == "Holding something next to something"
    assert known.metadata == {"source_split": "train", "placeholders": ["potato", "vicks vaporub bottle"]}
    assert known.videos[0].path == "20bn-something-something-v2/78687.mp4"
    assert (clips["1420"].text, clips["1420"].metadata) == ("", {"source_split": "test"})
    assert clips["42326"].videos[0].path == "42326.webm"  # named, but not there: the ledger will say so
    stray = clips["20bn-something-something-v2/999.mp4"]
    assert stray.problem == "no label file names this video"


def test_an_id_that_leaves_the_corpus_is_refused(tmp_path: Path) -> None:
    make_video(tmp_path / "outside.webm")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "train.json").write_text('[{"id":"../outside","label":"x","template":"X"}]')
    (clip,) = something_something_v2.list_clips(str(corpus))
    assert clip.problem and not clip.videos


@pytest.mark.parametrize(("content", "words"), [
    (None, "holds no label file"),
    ("[{]", "train.json is not JSON"),
    ('{"78687": "x"}', "is no list of labelled ids"),
])  # fmt: skip
def test_wrong_label_files_are_named(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "something-something-v2-train.json").write_text(content)
    with pytest.raises(InputError, match=words):
        something_something_v2.list_clips(str(tmp_path))
