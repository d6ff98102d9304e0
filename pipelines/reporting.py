"""Gathers what a finished demo left behind into the inputs of one report, and the table printed at its end."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from evaluation.report import (
    Command,
    DatasetInput,
    GateDecision,
    LineageNode,
    Prediction,
    ReportInputs,
    Stage,
    TrainingRun,
)
from evaluation.report.run import build, save_inputs
from evaluation.result import RESULT_NAME, EvaluationResult
from infra.config import Config
from infra.lineage import trace
from infra.registry import ENCODER, POLICY, RESULT_TAG, Registry
from infra.settings import settings
from infra.storage import join, read_json
from infra.tracking import Tracker
from ingest.reader import load_manifest
from training.callbacks.metrics_file import METRICS_NAME
from training.export import read_record
from training.recipes.rsp_pictures import PICTURES_NAME

SHOWN_PACKAGES = (
    "torch", "ray", "prefect", "mlflow", "metaworld", "mujoco", "av", "simplejpeg", "numpy", "timm", "webdataset",
)  # fmt: skip


class DemoOutcome(Config):
    """Addresses of everything the demo made; `gates` as the promote flow returns them."""

    frames: str
    episodes: str
    extra: str = ""  # the user's own corpus, where one is named
    encoder: str
    policy: str
    bad_policy: str
    gates: tuple[dict[str, Any], ...]
    seconds: dict[str, float]


def write_report(outcome: DemoOutcome, tracker: Tracker, folder: str) -> dict[str, Any]:
    """Write `report.json` and `report.html` into `folder`; returns the rows of the final table and the page's path."""
    registry = Registry(tracker)
    encoder_result = result_url(registry, ENCODER, outcome.encoder)
    policy_result = result_url(registry, POLICY, outcome.policy)
    inputs = ReportInputs(
        title="foreframe demo",
        subtitle="From simulated video to a promoted policy on two CPU cores",
        stages=stages(outcome),
        runs=(
            TrainingRun(name="RSP pre-training", metrics=beside(outcome.encoder, METRICS_NAME)),
            TrainingRun(name="behaviour cloning", metrics=beside(outcome.policy, METRICS_NAME)),
        ),
        predictions=(Prediction(strip=join(outcome.encoder, PICTURES_NAME), caption="prior sample"),),
        encoder_result=encoder_result,
        policy_result=policy_result,
        datasets=tuple(data_set(url) for url in (outcome.frames, outcome.episodes, outcome.extra) if url),
        decisions=tuple(decision(gate) for gate in outcome.gates),
        configs={
            "pre-training": read_json(beside(outcome.encoder, "config.json")),
            "policy": read_json(beside(outcome.policy, "config.json")),
            "label propagation": read_json(join(encoder_result, "config.json")),
            "rollouts": read_json(join(policy_result, "config.json")),
        },
        **origin(outcome.policy, SHOWN_PACKAGES),
        seeds={"training": 0, "evaluation": "10000 and up, never seen in training"},
        commands=(
            Command(what="everything on this page", command="make demo"),
            Command(what="this page again", command=f"foreframe report demo {shown(folder)}"),
            Command(what="the way back to the source videos", command=f"foreframe lineage {shown(outcome.policy)}"),
        ),
    )
    save_inputs(inputs, folder)
    page = build("demo", folder)
    return {
        "report": str(page),
        "encoder": rows(encoder_result),
        "policy": rows(policy_result),
        "gates": [dict(gate) for gate in outcome.gates],
        "seconds": outcome.seconds,
    }


def origin(export: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """What every page says of where it comes from: lineage of an export, versions of packages, machine, commit."""
    return {
        "lineage": tuple(
            LineageNode(kind=node.kind, id=node.id, url=node.url, inputs=node.inputs)
            for node in trace(export, home=settings().home_url).nodes
        ),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "environment": {
            "python": platform.python_version(),
            "cores": str(os.cpu_count()),
            "machine": platform.machine(),
        },
        "git_commit": git_commit(),
    }


def stages(outcome: DemoOutcome) -> tuple[Stage, ...]:
    """One card a stage; the predicted futures stand for pre-training."""
    return tuple(Stage(name=name, seconds=seconds) for name, seconds in outcome.seconds.items())


def result_url(registry: Registry, name: str, export: str) -> str:
    """Where the evaluation of an export lies."""
    version = registry.by_digest(name, str(read_record(export)["digest"]))
    return version.tags.get(RESULT_TAG, "") if version else ""


def data_set(url: str) -> DatasetInput:
    """A data set with the folder its videos came from, for thumbnails of the refused ones."""
    manifest, _ = load_manifest(url)
    return DatasetInput(url=url, name=manifest.name, source=source_of(url))


def source_of(url: str) -> str:
    """The corpus a data set was made from, as its ingest was told; empty when nothing says."""
    for name in sorted(Path(settings().home_url).glob("configs/ingest-*.json")):
        config = read_json(name)
        if config.get("output") == url:
            return str(config["source"])
    return ""


def decision(gate: dict[str, Any]) -> GateDecision:
    """What the promote flow returned, for the page."""
    return GateDecision(
        model=f"{gate['model']} version {gate['version']}",
        candidate=gate["candidate"],
        champion=gate["champion"],
        promote=gate["promote"],
        reasons=tuple(gate["reasons"]),
        note=gate.get("note", ""),
    )


def rows(result_folder: str) -> list[dict[str, Any]]:
    """Arm, value, interval and count of the primary metric."""
    result = EvaluationResult.parse(read_json(join(result_folder, RESULT_NAME)))
    arms = {"model": result.scores, **result.arm_scores}
    return [
        {"arm": arm, "metric": result.primary_metric, **scores[result.primary_metric].to_json()}
        for arm, scores in arms.items()
        if result.primary_metric in scores
    ]


def beside(export: str, name: str) -> str:
    """A file of the run that made an export."""
    return join(export.rsplit("/", 1)[0], name)


def git_commit() -> str:
    """The commit of the checkout, empty outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def shown(path: str) -> str:
    """A path below the working folder as a user would type it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
