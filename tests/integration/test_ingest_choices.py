"""What a recipe may ask of an ingest: filters whose decisions are listed, failures tried again, a plan with minutes."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from infra.errors import InputError
from infra.media import MediaError, scan
from ingest import job
from ingest.isolate import transcode_here
from ingest.reader import ShardDataset, load_manifest
from ingest.receipt import failure_ledger
from ingest.recipe import IngestConfig, Recipe
from ingest.verify import verify
from tests.helpers_media import ffmpeg, make_video


def config_of(source: Path, output: Path, *, replay: str = "", **recipe) -> IngestConfig:
    made = Recipe(short_side=48, shard_bytes=60_000, **recipe)
    return IngestConfig(
        source=str(source), output=str(output), name="test", recipe=made, workers=0, replay_failures=replay
    )


def synthetic(path: Path, source: str) -> None:
    argv = [ffmpeg(), "-y", "-loglevel", "error", "-f", "lavfi", "-i", source, "-c:v", "libx264"]
    subprocess.run([*argv, "-pix_fmt", "yuv420p", str(path)], check=True, timeout=60)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    original = make_video(folder / "a-moving.mp4", frames=24, size="96x64")
    argv = [ffmpeg(), "-y", "-loglevel", "error", "-i", original, "-vf", "scale=80:54", "-c:v", "libvpx"]
    subprocess.run([*argv, str(folder / "b-again.webm")], check=True, timeout=60)
    synthetic(folder / "c-black.mp4", "color=c=black:size=96x64:rate=12:duration=1")
    synthetic(folder / "d-still.mp4", "smptebars=size=96x64:rate=12:duration=1")
    synthetic(folder / "e-other.mp4", "mandelbrot=size=96x64:rate=12:end_pts=12,trim=duration=1")
    return folder


def ledger(url: Path) -> dict[str, str]:
    return {item.path: item.reason for item in failure_ledger(load_manifest(str(url))[0].receipts)}


def test_filters_leave_out_what_they_name_and_list_it(corpus, tmp_path):
    everything = job.run(config_of(corpus, tmp_path / "all"))
    assert everything.num_samples == 5
    config = config_of(corpus, tmp_path / "chosen", near_duplicate_bits=30, max_black_share=0.5, max_frozen_share=0.9)
    # Decisions about sound clips do not count against the allowed share of failures.
    manifest = job.run(
        config.model_copy(update={"recipe": config.recipe.model_copy(update={"max_failure_share": 0.0})})
    )
    assert ledger(tmp_path / "chosen") == {
        "b-again.webm": "near_duplicate",
        "c-black.mp4": "black",
        "d-still.mp4": "frozen",
    }
    (near,) = [item for item in failure_ledger(manifest.receipts) if item.reason == "near_duplicate"]
    assert near.message.endswith("bits from a-moving.mp4") and near.stage == "plan"
    assert manifest.num_samples == 2 and verify(str(tmp_path / "chosen")) == []


def test_records_say_how_much_moves_and_what_length_was_held_against(corpus, tmp_path):
    job.run(config_of(corpus, tmp_path / "data"))
    data = ShardDataset(str(tmp_path / "data"))
    cameras = {data.record(index).source_id: data.record(index).cameras["main"] for index in range(len(data))}
    assert cameras["d-still.mp4"].motion == pytest.approx(0, abs=0.2) and cameras["a-moving.mp4"].motion > 5
    assert cameras["c-black.mp4"].brightness == pytest.approx(0, abs=1)
    assert {name: camera.length for name, camera in cameras.items()} == {
        "a-moving.mp4": "declared",
        "b-again.webm": "unverified",
        "c-black.mp4": "declared",
        "d-still.mp4": "declared",
        "e-other.mp4": "declared",
    }
    assert load_manifest(str(tmp_path / "data"))[0].statistics["length"] == {"declared": 4, "unverified": 1}


def test_failures_are_tried_again_as_a_child_data_set(corpus, tmp_path):
    source = tmp_path / "corpus"
    shutil.copytree(corpus, source)
    sound = (source / "a-moving.mp4").read_bytes()
    (source / "a-moving.mp4").write_bytes(sound[: len(sound) // 2])
    (source / "e-other.mp4").write_bytes(b"")
    (source / "f-twin.mp4").write_bytes((source / "d-still.mp4").read_bytes())
    job.run(config_of(source, tmp_path / "parent", max_failure_share=0.5))
    before = {path.name: path.read_bytes() for path in (tmp_path / "parent").iterdir() if path.is_file()}
    assert ledger(tmp_path / "parent") == {
        "a-moving.mp4": "truncated",
        "e-other.mp4": "empty",
        "f-twin.mp4": "duplicate",
    }
    (source / "a-moving.mp4").write_bytes(sound)  # mended
    child = config_of(source, tmp_path / "child", replay=str(tmp_path / "parent"), max_failure_share=0.5)
    manifest = job.run(child)
    assert manifest.parent == load_manifest(str(tmp_path / "parent"))[1]
    data = ShardDataset(str(tmp_path / "child"))
    assert [data.record(index).source_id for index in range(len(data))] == ["a-moving.mp4"]
    assert ledger(tmp_path / "child") == {"e-other.mp4": "empty"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "parent").iterdir() if path.is_file()} == before
    with pytest.raises(InputError, match=r"none of 1 clips that failed .* e\.g\. 'e-other\.mp4'"):
        (source / "e-other.mp4").unlink()
        job.run(config_of(source, tmp_path / "third", replay=str(tmp_path / "child")))


def test_a_data_set_without_failures_has_nothing_to_replay(corpus, tmp_path):
    job.run(config_of(corpus, tmp_path / "data"))
    with pytest.raises(InputError, match="has no failures to replay"):
        job.run(config_of(corpus, tmp_path / "child", replay=str(tmp_path / "data")))


def test_the_plan_tells_minutes_from_clips_tried_here(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus/broken.mp4").write_bytes(b"no video")
    summary = job.describe(config_of(tmp_path / "corpus", tmp_path / "data"))
    assert summary["clips"] == 6 and 0 < summary["estimated_minutes"] < 1
    assert np.isclose(summary["source_hours"], 6 / 3600, rtol=0.2)
    assert not (tmp_path / "data").exists()
    shutil.rmtree(tmp_path / "corpus")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/broken.mp4").write_bytes(b"no video")
    assert job.describe(config_of(tmp_path / "corpus", tmp_path / "data"))["estimated_minutes"] is None


def test_spans_are_cut_by_the_frames_there_are(tmp_path):
    """The header's count and rate lie where an edit list hides frames or the rate varies; the packets do not."""
    source = tmp_path / "source"
    source.mkdir()
    whole = make_video(tmp_path / "whole.mp4", frames=100, fps=10, options=["-bf", "0", "-g", "100"])
    argv = [ffmpeg(), "-y", "-loglevel", "error", "-ss", "3.8", "-i", whole, "-c", "copy", source / "trimmed.mp4"]
    subprocess.run(argv, check=True, timeout=60)
    rates = "select='lt(n,60)+not(mod(n,12))',setpts=PTS"
    argv = [ffmpeg(), "-y", "-loglevel", "error", "-f", "lavfi", "-i", "testsrc2=size=96x64:rate=60:duration=6"]
    argv += ["-vf", rates, "-fps_mode", "vfr", "-c:v", "libx264", source / "varying.mp4"]
    subprocess.run(argv, check=True, timeout=60)
    (source / "labels.csv").write_text("path,start_s,end_s\nvarying.mp4,0,1\nvarying.mp4,1,6\ntrimmed.mp4,,\n")
    manifest = job.run(config_of(source, tmp_path / "data", max_frames_per_clip=20))
    assert manifest.num_failures == 0
    data = ShardDataset(str(tmp_path / "data"))
    frames: dict[str, list[int]] = {}
    for index in range(len(data)):
        frames.setdefault(data.record(index).source_id, []).append(data.num_frames(index))
    assert max(max(counts) for counts in frames.values()) <= 20
    shown = scan(source / "trimmed.mp4").num_frames
    assert {name: sum(counts) for name, counts in frames.items()} == {
        "varying.mp4@0-1": 60,
        "varying.mp4@1-6": 25,
        "trimmed.mp4": shown,
    }


def test_a_child_has_only_what_its_parent_lacks_in_the_same_split(tmp_path, monkeypatch):
    source = tmp_path / "source"
    for name in "abcdef":
        make_video(source / f"{name}.mp4", frames=20 + ord(name) % 7)
    recipe = {"max_frames_per_clip": 10, "validation_counts": {"folder": 2}, "max_failure_share": 0.9}
    plan = job.prepare_plan(config_of(source, tmp_path / "parent", **recipe))
    held_out = {clip.clip.source_id for shard in plan.shards for clip in shard.clips if clip.split == "validation"}
    assert len(held_out) == 2
    victim = min(held_out)
    real, calls = transcode_here, []

    def failing(path, settings, span):
        if path.name == victim and span.first:
            calls.append(span)
            raise MediaError("decode_error", "by this test")
        return real(path, settings, span)

    monkeypatch.setattr("ingest.build.transcode_here", failing)
    parent = job.run(config_of(source, tmp_path / "parent", **recipe))
    assert parent.num_failures == len(calls) > 0
    monkeypatch.undo()
    child = job.run(config_of(source, tmp_path / "child", replay=str(tmp_path / "parent"), **recipe))
    assert child.num_samples == len(calls) and child.statistics["split"] == {"validation": len(calls)}
    sets = [ShardDataset(str(tmp_path / name)) for name in ("parent", "child")]
    keys = [{data.key(index) for index in range(len(data))} for data in sets]
    assert not keys[0] & keys[1]
