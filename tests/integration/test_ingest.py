"""A folder of videos becomes a data set: both layouts, both engines, broken files beside good ones, S3, Ray."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from infra.errors import DataError, InputError, TooManyFailuresError
from infra.storage import join, list_names, put_folder, read_bytes
from ingest import job
from ingest.main import main
from ingest.reader import ShardDataset
from ingest.recipe import IngestConfig, Recipe
from ingest.verify import verify
from tests.helpers_media import break_corpus, make_corpus, make_video

SMALL = {"short_side": 48, "shard_bytes": 60_000, "validation_share": 0.34}


def config_of(source, output, **recipe) -> IngestConfig:
    return IngestConfig(
        corpus="folder", source=str(source), output=str(output), name="test", recipe=Recipe(**recipe), workers=0
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder, frame counts of its good videos)."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, make_corpus(folder)


@pytest.fixture(scope="module")
def clean(corpus, tmp_path_factory):
    """Data sets of the good videos: {(layout, engine): (url, manifest)}."""
    built = {}
    for layout in ("frames", "video"):
        for engine in ("pyav", "ffmpeg"):
            output = tmp_path_factory.mktemp(f"{layout}-{engine}") / "data"
            recipe = {
                **SMALL,
                "layout": layout,
                "engine": engine,
                "shard_bytes": 60_000 if layout == "frames" else 6000,
            }
            built[layout, engine] = (output, job.run(config_of(corpus[0], output, **recipe)))
    return built


@pytest.mark.parametrize("engine", ["pyav", "ffmpeg"])
@pytest.mark.parametrize("layout", ["frames", "video"])
def test_every_good_video_is_there_with_all_its_frames(corpus, clean, layout, engine):
    output, manifest = clean[layout, engine]
    data = ShardDataset(str(output))
    found = {data.record(index).source_id: data.num_frames(index) for index in range(len(data))}
    assert found == corpus[1]
    assert manifest.num_failures == 0 and len(manifest.receipts) > 1
    assert manifest.num_frames == sum(corpus[1].values())
    assert verify(str(output)) == []
    for index in range(len(data)):
        record = data.record(index).cameras["main"]
        assert min(record.width, record.height) == 48
        assert data.frames(index, [0, 5]).shape == (2, record.height, record.width, 3)
    assert manifest.statistics["split"]["validation"] == 2


def test_the_engines_store_the_same_pictures(clean):
    first, second = (ShardDataset(str(clean["frames", engine][0])) for engine in ("pyav", "ffmpeg"))
    other = {second.record(index).source_id: index for index in range(len(second))}
    for index in range(len(first)):
        pictures = first.frames(index, range(9)).astype(int)
        difference = np.abs(pictures - second.frames(other[first.record(index).source_id], range(9)))
        assert difference.mean() < 2, first.record(index).source_id


@pytest.mark.parametrize("layout", ["frames", "video"])
def test_shards_open_with_tarfile_and_webdataset(clean, layout):
    output, manifest = clean[layout, "pyav"]
    names = []
    for receipt in manifest.receipts:
        with tarfile.open(output / f"shard-{receipt.shard:05d}.tar") as tar:
            for member in tar:
                assert member.isreg() and member.mtime == 0 and member.uid == 0
                names.append(member.name)
    assert len(names) == len(set(names)) == sum(receipt.num_members for receipt in manifest.receipts)
    urls = [str(output / f"shard-{receipt.shard:05d}.tar") for receipt in manifest.receipts]
    seen = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(seen) == manifest.num_samples
    for sample in seen:
        record = json.loads(sample["json"])
        assert record["key"] == sample["__key__"]
        assert ("f000000.jpg" in sample) == (layout == "frames") and ("main.mp4" in sample) == (layout == "video")
    if layout == "video":
        times = np.load(io.BytesIO(seen[0]["npz"]))["timestamps"]
        assert times == pytest.approx(np.arange(len(times)) / 12, abs=2e-3)


def test_records_are_a_function_of_the_plan(corpus, clean, tmp_path):
    """The same corpus at another place, another time: every hashed byte is equal."""
    shutil.copytree(corpus[0], tmp_path / "moved")
    job.run(config_of(tmp_path / "moved", tmp_path / "data", layout="frames", **SMALL))
    original = clean["frames", "pyav"][0]
    names = [name for name in list_names(original) if not name.endswith(".log.json")]
    assert len(names) > 5
    for name in names:
        assert (tmp_path / "data" / name).read_bytes() == (original / name).read_bytes(), name
    receipts = b"".join((original / name).read_bytes() for name in names if "receipt" in name)
    for word in (b"seconds_per", b"host", b"attempt", str(corpus[0]).encode(), os.uname().nodename.encode()):
        assert word not in receipts
    log = json.loads((original / "shard-00000.log.json").read_bytes())
    assert log["seconds"] >= 0 and log["attempt"] == 0
    assert not (original / ".building").exists() and not (original / "attempts").exists()


def test_a_second_run_does_nothing(corpus, clean, monkeypatch):
    output, manifest = clean["frames", "pyav"]
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    monkeypatch.setattr("ingest.job.prepare_plan", None)
    assert job.run(config_of(corpus[0], output, layout="frames", **SMALL)) == manifest
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_an_output_takes_one_recipe_only(corpus, clean):
    output, _ = clean["frames", "pyav"]
    with pytest.raises(DataError, match="jpeg_quality"):
        job.run(config_of(corpus[0], output, layout="frames", jpeg_quality=50, **SMALL))


def test_broken_files_end_in_the_ledger_and_good_ones_in_the_shards(corpus, tmp_path):
    shutil.copytree(corpus[0], tmp_path / "corpus")
    expected = break_corpus(tmp_path / "corpus")
    config = config_of(tmp_path / "corpus", tmp_path / "data", max_failure_share=0.6, **SMALL)
    manifest = job.run(config)
    failures = {failure.path: failure for receipt in manifest.receipts for failure in receipt.failures}
    assert {path: failure.reason for path, failure in failures.items()} == expected
    for path, failure in failures.items():
        assert failure.sha256 == hashlib.sha256((tmp_path / "corpus" / path).read_bytes()).hexdigest()
    data = ShardDataset(str(tmp_path / "data"))
    assert {data.record(index).source_id for index in range(len(data))} == set(corpus[1])
    assert manifest.statistics["failures"]["hostile_container"] == 2
    assert verify(str(tmp_path / "data")) == []


def test_too_many_failures_stop_and_name_the_reason(tmp_path):
    make_video(tmp_path / "corpus/good.mp4")
    for number in range(3):
        (tmp_path / f"corpus/bad-{number}.mp4").write_bytes(b"not a video %d" % number)
    config = config_of(tmp_path / "corpus", tmp_path / "data")
    with pytest.raises(TooManyFailuresError, match=r"3 of 4 clips failed.*mostly not_video \(3\)"):
        job.run(config)
    assert "manifest.json" not in list_names(tmp_path / "data")
    patient = config.model_copy(update={"recipe": config.recipe.model_copy(update={"max_failure_share": 0.8})})
    assert job.run(patient).num_samples == 1  # the committed shards stand


def test_annotations_that_disagree_with_the_video_are_refused(tmp_path):
    root = tmp_path / "set"
    lengths = {"right": 12, "fewer": 10, "more": 15}
    for name, declared in lengths.items():
        make_video(root / f"videos/{name}.mp4", fps=declared)
        state = np.zeros((declared, 3)).tolist()
        record = {
            "texts": [name],
            "videos": [{"video_path": f"videos/{name}.mp4"}],
            "state": state,
            "action": state[1:],
        }
        (root / "annotation/val").mkdir(parents=True, exist_ok=True)
        (root / f"annotation/val/{name}.json").write_text(json.dumps(record))
    (root / "annotation/val/none.json").write_text("{")
    shutil.copyfile(root / "videos/more.mp4", root / "videos/stray.mp4")
    config = config_of(root, tmp_path / "data", max_failure_share=1.0, max_frames_per_clip=5)
    manifest = job.run(config.model_copy(update={"corpus": "annotated"}))
    failures = [failure for receipt in manifest.receipts for failure in receipt.failures]
    assert {failure.path: failure.reason for failure in failures} == {
        "videos/fewer.mp4": "bad_annotation",
        "videos/more.mp4": "short_decode",
        "annotation/val/none.json": "bad_annotation",
        "videos/stray.mp4": "bad_annotation",
    }
    data = ShardDataset(str(tmp_path / "data"))
    parts = sorted((data.record(index).cameras["main"].frame_numbers or (0,))[0] for index in range(len(data)))
    assert parts == [0, 4, 8]
    last = next(i for i in range(3) if (data.record(i).cameras["main"].frame_numbers or (0,))[0] == 8)
    assert data.record(last).cameras["main"].frame_numbers == (8, 9, 10, 11)
    assert {name: len(values) for name, values in data.arrays(last).items()} == {"actions": 3, "proprioception": 4}
    assert data.text(last) == "right"


def test_a_source_that_changed_after_planning_is_refused(corpus, tmp_path):
    shutil.copytree(corpus[0], tmp_path / "corpus")
    config = config_of(tmp_path / "corpus", tmp_path / "data", max_failure_share=0.5, **SMALL)
    job.prepare_plan(config)
    shutil.copyfile(tmp_path / "corpus/c.mkv", tmp_path / "corpus/a/bars.mp4")
    (tmp_path / "corpus/b/old.avi").unlink()
    make_video(tmp_path / "corpus/late.mp4")
    manifest = job.run(config)
    failures = {failure.path: failure.reason for receipt in manifest.receipts for failure in receipt.failures}
    assert failures == {"a/bars.mp4": "unreadable", "b/old.avi": "not_found"}
    assert manifest.num_samples == 4


def test_verify_finds_what_was_touched(clean, tmp_path):
    def damaged(edit) -> list[str]:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(clean["frames", "pyav"][0], folder)
        edit(folder)
        return verify(str(folder))

    def flip(folder: Path) -> None:
        data = bytearray((folder / "shard-00000.tar").read_bytes())
        data[3000] ^= 1
        (folder / "shard-00000.tar").write_bytes(data)

    assert damaged(lambda folder: None) == []
    assert any("sha256" in problem for problem in damaged(flip))
    assert damaged(lambda folder: (folder / "shard-00001.tar").unlink()) != []
    assert any("idx" in problem for problem in damaged(lambda folder: (folder / "shard-00001.idx").write_bytes(b"x")))
    assert damaged(lambda folder: (folder / "shard-00001.receipt.json").unlink()) != []
    with pytest.raises(InputError, match=r"manifest\.json"):
        verify(str(tmp_path))


def test_command_line_plans_refuses_and_builds(corpus, tmp_path, capsys):
    config = config_of(corpus[0], tmp_path / "data", **SMALL)
    config.save(tmp_path / "config.json")
    assert main([str(tmp_path / "config.json"), "--dry-run"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["clips"] == 6 and summary["shards"] > 1 and not summary["complete"]
    assert not (tmp_path / "data").exists()
    (tmp_path / "config.json").write_text(json.dumps({**config.to_json(), "corpus": "foldr"}))
    assert main([str(tmp_path / "config.json")]) == 2
    message = capsys.readouterr().err
    assert "foldr" in message and "folder" in message and message.count("\n") == 1


@pytest.mark.s3
def test_from_s3_to_s3_gives_the_same_manifest(corpus, clean, moto_s3):
    put_folder(corpus[0], join(moto_s3, "ingest/corpus"))
    output = join(moto_s3, "ingest/data")
    job.run(config_of(join(moto_s3, "ingest/corpus"), output, layout="frames", **SMALL))
    assert read_bytes(join(output, "manifest.json")) == (clean["frames", "pyav"][0] / "manifest.json").read_bytes()
    assert verify(output) == []
    data = ShardDataset(output)
    assert data.frames(0, [3]).shape[0] == 1


@pytest.mark.ray
def test_on_ray_with_a_worker_that_dies(corpus, clean, tmp_path, monkeypatch):
    """Ray replaces the worker, the next attempt isolates, and the bytes are those of an undisturbed run."""
    monkeypatch.setenv("FOREFRAME_FAULT", "ingest.decode@odd.webm")
    monkeypatch.setenv("FOREFRAME_FAULT_ONCE", str(tmp_path / "died"))
    config = config_of(corpus[0], tmp_path / "data", layout="frames", **SMALL).model_copy(update={"workers": 2})
    manifest = job.run(config)
    assert (tmp_path / "died").exists()
    assert manifest == clean["frames", "pyav"][1]
    logs = [
        json.loads((tmp_path / "data" / name).read_bytes())
        for name in list_names(tmp_path / "data", suffix=".log.json")
    ]
    assert sorted(log["attempt"] for log in logs)[-1] == 1


@pytest.mark.skipif(not os.environ.get("FOREFRAME_CORPUS"), reason="FOREFRAME_CORPUS names no annotated corpus")
def test_real_annotated_corpus_is_ingested_whole(tmp_path):
    config = config_of(os.environ["FOREFRAME_CORPUS"], tmp_path / "data", layout="video")
    manifest = job.run(config.model_copy(update={"corpus": "annotated"}))
    assert manifest.num_failures == 0 and manifest.num_samples > 0
    data = ShardDataset(str(tmp_path / "data"))
    for index in range(len(data)):
        for name, values in data.arrays(index).items():
            frames = data.num_frames(index)
            assert len(values) in ((frames,) if name != "actions" else (frames - 1, frames))
