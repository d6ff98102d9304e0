"""The whole flow on two tasks and a handful of steps: from the simulator to a registered video model and its page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.result import EvaluationResult
from infra.lineage import trace
from infra.registry import CANDIDATE, RESULT_TAG, VIDEO, Registry
from infra.storage import read_json
from infra.tracking import Tracker
from tests.helpers_flow import command, files, flow, own_home, words

pytestmark = [pytest.mark.prefect, pytest.mark.sim]

SMALL: dict[str, list[str]] = {
    "simulate_override": [
        "episodes=2",
        'tasks=["drawer-open","handle-press"]',
        "size=64",
        "damage=false",
        "workers=1",
    ],
    "ingest_override": ["recipe.validation_share=0.5", "workers=0"],
    "clips_override": ["num_frames=4", "stride=8", "start_every=8"],
    "vae_override": ["schedule.steps=2", "schedule.warmup_steps=1", "global_batch_size=4", "report_frames=8"],
    "cache_override": ["workers=0"],
    "override": [
        "schedule.steps=2",
        "global_batch_size=2",
        "log_every_steps=1",
        "previews.every_steps=2",
        "previews.num_clips=1",
        "previews.num_steps=2",
        "previews.validation_clips=1",
        "previews.validation_draws=1",
    ],
    "evaluation_override": [
        "num_clips=2",
        "num_steps=2",
        "num_draws=1",
        "num_resamples=20",
        "num_pictures=1",
        "probe.max_frames=16",
        "features=[]",
    ],
}
FINETUNE = ["finetune", *words(**SMALL)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory.mktemp("home")) as folder:
        yield folder


@pytest.fixture(scope="module")
def export(home: Path) -> str:
    return flow(*FINETUNE)


def test_a_candidate_with_a_card_and_previews_is_registered(export):
    candidate = Registry(Tracker()).alias(VIDEO, CANDIDATE)
    assert candidate is not None
    assert (candidate.url, candidate.export_digest) == (export, read_json(f"{export}/export.json")["digest"])
    card = (Path(export) / "README.md").read_text()
    assert "Text-guided video model" in card and "validation loss" in card and "load_video_model" in card
    assert {path.suffix for path in (Path(export).parent / "previews").iterdir()} == {".mp4", ".png"}


def test_the_model_was_evaluated_beside_its_arms(export):
    candidate = Registry(Tracker()).alias(VIDEO, CANDIDATE)
    assert candidate is not None
    result = EvaluationResult.parse(read_json(f"{candidate.tags[RESULT_TAG]}/result.json"))
    assert {"copy-first-frame", "autoencoder"} <= set(result.arms)
    assert result.primary_metric == "validation_loss" and not result.higher_is_better
    assert {item.stratum for item in result.items} <= {"drawer-open", "handle-press"}


def test_training_and_evaluation_saw_different_episodes(export, home):
    config = json.loads((Path(export).parent / "config.json").read_text())
    assert [source["split"] for source in config["data"]["sources"]] == ["train"]
    assert all(source["latents"] for source in config["data"]["sources"])
    (rated,) = (home / "results").glob("video-prediction-*/config.json")
    assert [source["split"] for source in json.loads(rated.read_text())["sources"]] == ["validation"]


def test_the_lineage_reaches_the_source_videos(export, home):
    found = trace(export, home=str(home))
    assert len(found.sources) == 4
    assert found.missing == ()
    assert {"tvp", "video-vae", "latent-cache", "data set", "given weights"} <= {node.kind for node in found.nodes}


def test_the_page_of_the_run_is_there(export, home):
    (page,) = (home / "reports").glob("finetune-tvp-*/report.html")
    html = page.read_text()
    for said in ("autoencoder", "copy first frame", "step-000002", "foreframe promote --model foreframe-video"):
        assert said in html, said


def test_the_gate_answers_for_a_video_model(export):
    said = flow("promote", "--model", VIDEO)
    assert "foreframe-video version 1: refused" in said
    assert "too few" in said  # two clips give no interval


def test_previews_conversion_and_cache_from_the_command_line(export, home, tmp_path, capsys):
    from diffusers import UNetSpatioTemporalConditionModel
    from safetensors.torch import load_file

    (data,) = (home / "datasets").iterdir()
    (autoencoder,) = (home / "runs").glob("vae-tiny-*/export")
    small = ["--num-clips", "1", "--num-steps", "2", "--output", str(tmp_path / "shown")]
    assert command("finetune", "preview", "--model", export, "--data", str(data), *small) == 0
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {"preview.mp4", "preview.png"}
    assert command("finetune", "preview", "--model", str(autoencoder), "--data", str(data), *small) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "'video-vae' export" in error

    folder = tmp_path / "converted"
    assert command("finetune", "convert", export, str(folder)) == 0
    weights = load_file(f"{export}/model.safetensors")
    unet = UNetSpatioTemporalConditionModel.from_pretrained(folder / "unet")
    assert all(value.equal(weights[f"unet.{name}"]) for name, value in unet.state_dict().items())
    assert command("finetune", "convert", export, str(folder)) == 2
    assert "is not empty" in capsys.readouterr().err.splitlines()[-1]

    plan = ["--data", str(data), "--vae", str(folder), "--output", str(tmp_path / "cache"), "-o", "image_size=64"]
    capsys.readouterr()
    assert command("finetune", "cache", "--dry-run", *plan) == 0
    assert json.loads(capsys.readouterr().out)["latent_shape"] == [4, 8, 8]
    assert not (tmp_path / "cache").exists()


def test_a_second_run_finds_everything_done(export, home):
    before = files(home)
    assert before
    assert flow(*FINETUNE) == export
    assert files(home) == before
    assert [version.version for version in [Registry(Tracker()).alias(VIDEO, CANDIDATE)] if version] == [1]
