"""What a recipe may ask of an ingest: filters whose decisions are listed, failures tried again, a plan with minutes."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from infra.errors import InputError
from ingest import job
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
    with pytest.raises(InputError, match=r"none of the 1 clips that failed .* e\.g\. 'e-other\.mp4'"):
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
