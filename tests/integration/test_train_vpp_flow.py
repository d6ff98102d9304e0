"""The Video Prediction Policy by its flow: from a video model and episodes to a registered policy beside its arms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.result import EvaluationResult
from infra.lineage import trace
from infra.registry import CANDIDATE, POLICY, RESULT_TAG, Registry
from infra.storage import read_json
from infra.tracking import Tracker
from tests.helpers_flow import command, files, flow, own_home, words
from tests.integration.test_finetune_tvp_flow import SMALL as SMALL_FINETUNE

pytestmark = [pytest.mark.prefect, pytest.mark.sim, pytest.mark.slow]

SMALL = {
    "simulate_override": SMALL_FINETUNE["simulate_override"],
    "finetune_override": [
        "model.num_frames=8", "schedule.steps=2", "global_batch_size=2", "log_every_steps=1", "previews.every_steps=0",
    ],
    "feature_override": ["workers=0"],
    "override": [
        "schedule.steps=4", "global_batch_size=8", "log_every_steps=1", "validation.every_steps=2",
        "validation.decisions=8", "checkpoint.every_steps=2", "provider.frames=2",
    ],
    "evaluation_override": ["num_seeds=2", "max_steps=12", "size=64", "workers=1", "num_clips=1"],
}  # fmt: skip
TRAIN = ["train-policy", "--method", "vpp", *words(**SMALL)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory.mktemp("home")) as folder:
        yield folder


@pytest.fixture(scope="module")
def export(home: Path) -> str:
    """A video model of a few steps first, then the policy on it, both by the command line."""
    flow("finetune", *words(**SMALL_FINETUNE))
    return flow(*TRAIN)


def rated() -> EvaluationResult:
    candidate = Registry(Tracker()).alias(POLICY, CANDIDATE)
    assert candidate is not None
    return EvaluationResult.parse(read_json(f"{candidate.tags[RESULT_TAG]}/result.json"))


def test_the_policy_is_candidate_with_a_card_that_names_its_video_model(export, home):
    candidate = Registry(Tracker()).alias(POLICY, CANDIDATE)
    assert candidate is not None and candidate.url == export
    (video,) = (home / "runs").glob("tvp-tiny-*/export/export.json")
    digest = json.loads(video.read_text())["digest"]
    assert digest in (Path(export) / "README.md").read_text()
    assert digest in json.loads((Path(export) / "export.json").read_text())["inputs"]


def test_it_was_rolled_out_beside_every_arm_and_an_untrained_video_model(export):
    result = rated()
    arms = {"random-actions", "mean-demonstration", "proprioception", "other-episode", "oracle", "random-video-model"}
    assert set(result.arms) == arms
    assert {item.stratum for item in result.items} == {"drawer-open", "handle-press"}
    assert all(len(items) == len(result.items) for items in result.arms.values())


def test_all_heads_had_equal_steps(export, home):
    runs = [json.loads(path.read_text()) for path in (home / "runs").glob("vpp-tiny-*/config.json")]
    assert len(runs) == 3
    assert {run["schedule"]["steps"] for run in runs} == {4}
    kinds = [None if run["provider"] is None else run["provider"]["random_seed"] for run in runs]
    assert sorted(kinds, key=str) == [0, None, None]


def test_the_held_out_error_is_in_the_curve(export):
    rows = [json.loads(line) for line in (Path(export).parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_action_mse" in row] == [1, 2, 4]


def test_the_lineage_reaches_the_source_videos(export, home):
    found = trace(export, home=str(home))
    assert found.missing == ()
    assert len(found.sources) == 4


def test_a_second_run_finds_everything_done(export, home):
    before = files(home)
    assert flow(*TRAIN) == export
    assert files(home) == before


def test_a_moved_video_model_is_named_in_one_line(export, home, capsys):
    (video,) = (home / "runs").glob("tvp-tiny-*/export")
    moved = video.with_name("moved")
    video.rename(moved)
    try:
        assert command("serve", export, "--port", "0") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and str(video) in error
    finally:
        moved.rename(video)
