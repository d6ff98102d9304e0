"""Gathers what a finished `finetune-tvp` left behind into one report, and records weights that came from outside."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from evaluation.report import (
    Command,
    DatasetInput,
    ReportInputs,
    Stage,
    TrainingRun,
)
from evaluation.report.inputs import VIDEO_SECTIONS
from evaluation.report.run import INPUTS_NAME, build, save_inputs
from infra.config import Config
from infra.digests import pretty_json, sha256_json, short
from infra.settings import settings
from infra.storage import create_only, exists, join, read_json
from ingest.reader import load_manifest
from pipelines.reporting import beside, data_set, origin, shown
from training.callbacks.metrics_file import METRICS_NAME
from training.callbacks.previews import PREVIEWS
from training.export import read_record
from training.export_video import video_digest
from training.models.common.text import TokenEncoder
from training.models.tvp.official import is_diffusers_folder
from training.recipes.tvp import FinetuneConfig
from training.recipes.vae_quality import SHEET_NAME

SHOWN_PACKAGES = ("torch", "diffusers", "transformers", "ray", "prefect", "mlflow", "av", "numpy")
GIVEN = "given weights"


class FinetuneOutcome(Config):
    """Addresses of everything a fine-tuning made; `autoencoder` is empty where the initial weights brought one."""

    export: str
    autoencoder: str = ""
    result: str
    data: tuple[str, ...]
    seconds: dict[str, float]


def record_given_weights(config: FinetuneConfig) -> None:
    """Note weights that no run here made, so that a lineage ends at them by name instead of leading nowhere."""
    text = config.model.text
    given = {f"text-encoder-{text.kind}": TokenEncoder(text).digest}
    if config.initial and is_diffusers_folder(config.initial):
        given[PurePosixPath(config.initial).name] = video_digest(config.initial)
    for name, digest in given.items():
        record = {"id": digest, "digest": digest, "kind": GIVEN, "inputs": []}
        create_only(settings().at("weights", f"{name}-{short(digest)}", "export.json"), pretty_json(record))


def write_video_report(outcome: FinetuneOutcome) -> str:
    """Write `report.json` and `report.html` below the home folder; returns the page's path.

    What is saved already stays: a second run finds everything done, and its seconds say nothing.
    """
    folder = settings().at("reports", f"finetune-tvp-{short(sha256_json([outcome.export, outcome.result]))}")
    if not exists(join(folder, INPUTS_NAME)):
        save_inputs(report_inputs(outcome, folder), folder)
    return str(build("video", folder))


def report_inputs(outcome: FinetuneOutcome, folder: str) -> ReportInputs:
    """Everything the page shows, as addresses and plain values."""
    reconstruction = join(outcome.autoencoder, SHEET_NAME) if outcome.autoencoder else ""
    return ReportInputs(
        title="Text-guided video model",
        subtitle=f"Export {short(str(read_record(outcome.export)['digest']))} of {len(outcome.data)} data set(s)",
        sections=VIDEO_SECTIONS,
        stages=tuple(Stage(name=name, seconds=seconds) for name, seconds in outcome.seconds.items()),
        runs=_runs(outcome),
        video_result=outcome.result,
        preview_folder=beside(outcome.export, PREVIEWS),
        reconstruction=reconstruction if reconstruction and exists(reconstruction) else "",
        datasets=tuple(_data_set(url) for url in outcome.data),
        configs=_configs(outcome),
        **origin(outcome.export, SHOWN_PACKAGES),
        commands=(
            Command(what="this page again", command=f"foreframe report video {shown(folder)}"),
            Command(
                what="more previews",
                command=f"foreframe finetune preview --model {shown(outcome.export)} --data {shown(outcome.data[0])} "
                "--output previews",
            ),
            Command(what="the gate's verdict", command="foreframe promote --model foreframe-video"),
            Command(what="the way back to the source videos", command=f"foreframe lineage {shown(outcome.export)}"),
        ),
    )


def _runs(outcome: FinetuneOutcome) -> tuple[TrainingRun, ...]:
    places = {"autoencoder": outcome.autoencoder, "video model": outcome.export}
    return tuple(TrainingRun(name=name, metrics=beside(url, METRICS_NAME)) for name, url in places.items() if url)


def _configs(outcome: FinetuneOutcome) -> dict[str, dict[str, Any]]:
    places = {
        "autoencoder": beside(outcome.autoencoder, "config.json") if outcome.autoencoder else "",
        "video model": beside(outcome.export, "config.json"),
        "evaluation": join(outcome.result, "config.json"),
    }
    return {name: read_json(url) for name, url in places.items() if url}


def _data_set(url: str) -> DatasetInput:
    known = data_set(url)
    return known.model_copy(update={"name": load_manifest(url)[0].name})
