"""Killed at any instant, run again: the data set is the one of an undisturbed run, to the last byte."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra.errors import ServiceError
from infra.faults import fault_point
from ingest import job
from ingest.attempts import MAX_NAMED_DEATHS
from ingest.isolate import transcode_isolated
from ingest.recipe import IngestConfig, Recipe
from ingest.verify import verify
from tests.faults import random_kills
from tests.helpers_media import make_video

PROJECT = Path(__file__).parents[2]
POINTS = [
    "ingest.before_plan",
    "storage.half_written@plan.json",
    "ingest.after_plan",
    "ingest.decode:2",
    "ingest.after_clip",
    "ingest.before_tar",
    "ingest.after_tar",
    "ingest.after_idx",
    "storage.half_written@receipt.json",
    "storage.before_link@receipt.json",
    "ingest.after_receipt",
    "ingest.before_manifest",
    "storage.half_written@manifest.json",
    "ingest.after_manifest",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        make_video(folder / f"clip-{number}.mp4", frames=6, size=f"{64 + 16 * number}x64")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def config_of(corpus: Path, output: Path, **recipe) -> IngestConfig:
    values = {"short_side": 32, "shard_bytes": 20_000, "max_failure_share": 0.9} | recipe
    return IngestConfig(source=str(corpus), output=str(output), name="faults", recipe=Recipe(**values), workers=0)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "data"
    manifest = job.run(config_of(corpus, output))
    assert len(manifest.receipts) == 2 and manifest.num_samples == 3
    return content(output)


def run_child(config: IngestConfig, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    config.save(folder / "config.json")
    argv = [sys.executable, "-m", "ingest.main", str(folder / "config.json")]
    variables = {**os.environ, "PYTHONPATH": str(PROJECT), **environment}
    return subprocess.run(argv, env=variables, capture_output=True, text=True, timeout=120, check=False)


def content(output: Path) -> dict[str, bytes]:
    """Every visible file but the logs. A kill within a write may leave a temporary name, which nothing reads."""
    names = (path for path in output.iterdir() if not path.name.startswith(".") or not path.name.endswith(".part"))
    return {path.name: path.read_bytes() for path in names if not path.name.endswith(".log.json")}


@pytest.mark.parametrize("point", POINTS)
def test_killed_there_and_run_again(corpus, undisturbed, tmp_path, point):
    config = config_of(corpus, tmp_path / "data")
    assert run_child(config, tmp_path, FOREFRAME_FAULT=point).returncode == -signal.SIGKILL
    assert (tmp_path / "data/manifest.json").exists() == (point == "ingest.after_manifest")
    job.run(config)
    assert content(tmp_path / "data") == undisturbed
    assert verify(str(tmp_path / "data")) == []


@pytest.mark.ray
def test_killed_on_ray_and_run_again(tmp_path):
    """One output of what `python -m tests.faults.random_kills` does: a worker dies halfway through a receipt."""
    random_kills.make_corpus(tmp_path / "corpus")
    job.run(random_kills.config_of(tmp_path / "corpus", tmp_path / "undisturbed", workers=0))
    killer = random_kills.Killer(tmp_path, seed=0, usual_s=10)
    killer.output(tmp_path / "corpus", random_kills.content(tmp_path / "undisturbed"), ["in a receipt"])
    tally = killer.tally
    assert tally.kills == {"in a receipt": 1}
    assert (tally.different, tally.lost, tally.duplicated, tally.touched) == (0, 0, 0, 0)
    assert tally.redone == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_instants(tmp_path):
    """No instant is special: whatever was killed, the finished data set is the same."""
    tally = random_kills.kill_at_random(tmp_path, kills=50, seed=1)
    assert tally.kills.total() == 50
    assert (tally.different, tally.lost, tally.duplicated, tally.touched) == (0, 0, 0, 0)


def test_a_video_that_kills_the_decoder_is_named(corpus, tmp_path):
    """First the worker dies, then only the child that touches the poison: every other clip is there."""
    config = config_of(corpus, tmp_path / "data")
    environment = {"FOREFRAME_FAULT": "ingest.decode@clip-1.mp4"}
    assert run_child(config, tmp_path, **environment).returncode == -signal.SIGKILL
    second = run_child(config, tmp_path, **environment)
    assert second.returncode == 0, second.stderr
    assert failures_of(tmp_path / "data") == {"broken.mp4": "not_video", "clip-1.mp4": "crash"}


@pytest.mark.parametrize("deaths", [0, 1, 2, 3])
def test_only_what_was_in_work_at_a_death_is_isolated(corpus, undisturbed, tmp_path, monkeypatch, deaths):
    """After many deaths of one shard nothing in it is trusted."""
    config = config_of(corpus, tmp_path / "data", shard_bytes=10**9)
    videos = [f"clip-{number}.mp4" for number in range(3)]
    for name in videos[:deaths]:
        assert run_child(config, tmp_path, FOREFRAME_FAULT=f"ingest.decode@{name}").returncode == -signal.SIGKILL
    isolated = []

    def watched(path, settings, span, **limits):
        isolated.append(path.name)
        return transcode_isolated(path, settings, span, **limits)

    monkeypatch.setattr("ingest.build.transcode_isolated", watched)
    assert job.run(config).num_samples == 3
    assert sorted(isolated) == (["broken.mp4", *videos] if deaths > MAX_NAMED_DEATHS else videos[:deaths])


def test_a_corpus_with_many_poisoned_videos_ends(corpus, tmp_path):
    config = config_of(corpus, tmp_path / "data", shard_bytes=10**9, max_failure_share=1.0)
    environment = {"FOREFRAME_FAULT": ",".join(f"ingest.decode@clip-{number}" for number in range(3))}
    codes = [run_child(config, tmp_path, **environment).returncode for _ in range(4)]
    assert codes == [-signal.SIGKILL] * 3 + [0]
    assert set(failures_of(tmp_path / "data").values()) == {"not_video", "crash"}


def test_a_video_that_hangs_the_decoder_is_named(corpus, tmp_path):
    config = config_of(corpus, tmp_path / "data", item_timeout_s=3.0)
    environment = {"FOREFRAME_FAULT": "ingest.decode@clip-2.mp4", "FOREFRAME_FAULT_ACTION": "hang"}
    first = run_child(config, tmp_path, **environment)
    assert first.returncode == 1 and "Timeout" in first.stderr  # the watchdog ended it
    assert run_child(config, tmp_path, **environment).returncode == 0
    assert failures_of(tmp_path / "data") == {"broken.mp4": "not_video", "clip-2.mp4": "timeout"}


def test_a_header_that_kills_the_reader_is_refused_by_the_plan(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("FOREFRAME_FAULT", "ingest.probe@clip-0.mp4")
    job.run(config_of(corpus, tmp_path / "data"))
    assert failures_of(tmp_path / "data") == {"broken.mp4": "not_video", "clip-0.mp4": "crash"}


def test_a_run_whose_workers_keep_dying_gives_up(corpus, tmp_path):
    """Ray would replace them for ever."""
    from ingest.attempts import ATTEMPTS
    from ingest.build import build_shard

    config = config_of(corpus, tmp_path / "data")
    plan = job.prepare_plan(config)
    for number in range(4):
        mark = tmp_path / "data" / ATTEMPTS / f"shard-00000.run1.{number}"
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
    with pytest.raises(ServiceError, match="4 workers died"):
        build_shard(plan.shards[0], config, plan_id=plan.plan_id, run_id="run1")
    assert build_shard(plan.shards[0], config, plan_id=plan.plan_id, run_id="run2").num_samples > 0


def test_two_builders_of_one_shard_agree(corpus, undisturbed, tmp_path):
    from ingest.build import build_shard

    config = config_of(corpus, tmp_path / "data")
    plan = job.prepare_plan(config)
    first, second = (build_shard(plan.shards[0], config, plan_id=plan.plan_id, run_id=name) for name in "ab")
    assert first == second
    job.run(config)
    assert content(tmp_path / "data") == undisturbed


def test_fault_points_cost_nothing_and_hit_only_their_name(monkeypatch):
    monkeypatch.delenv("FOREFRAME_FAULT", raising=False)
    fault_point("any")
    monkeypatch.setenv("FOREFRAME_FAULT", "other:1")
    fault_point("any")
    monkeypatch.setenv("FOREFRAME_FAULT", "any@rank=1 step=7")
    fault_point("any", detail="rank=1 step=0")
    monkeypatch.setenv("FOREFRAME_FAULT", "any@detail")
    fault_point("any", detail="something else")
    code = "from infra.faults import fault_point\nfor i in range(3):\n    print(i, flush=True)\n    fault_point('here')"
    variables = {**os.environ, "PYTHONPATH": str(PROJECT), "FOREFRAME_FAULT": "here:2"}
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.split()) == (-signal.SIGKILL, ["0", "1"])


def failures_of(output: Path) -> dict[str, str]:
    manifest = json.loads((output / "manifest.json").read_bytes())
    found = [failure for receipt in manifest["receipts"] for failure in receipt["failures"]]
    assert manifest["num_samples"] + len(found) == 4
    return {failure["path"]: failure["reason"] for failure in found}
