"""Gathers what a finished `train-policy` left behind into one report."""

from __future__ import annotations

from evaluation.report import Command, ReportInputs, Stage, TrainingRun
from evaluation.report.inputs import POLICY_SECTIONS
from evaluation.report.run import INPUTS_NAME, build, save_inputs
from evaluation.result import RESULT_NAME, EvaluationResult
from infra.config import Config
from infra.digests import sha256_json, short
from infra.settings import settings
from infra.storage import exists, join, read_json
from pipelines.reporting import beside, data_set, origin, shown
from training.callbacks.metrics_file import METRICS_NAME

SHOWN_PACKAGES = ("torch", "diffusers", "ray", "prefect", "mlflow", "metaworld", "mujoco", "av", "numpy", "timm")


class PolicyOutcome(Config):
    """Addresses of everything a policy's training made; `trained` are exports by what they are called here."""

    method: str
    export: str
    trained: dict[str, str]
    result: str
    data: str
    seconds: dict[str, float]


def write_policy_report(outcome: PolicyOutcome) -> str:
    """Write `report.json` and `report.html` below the home folder; returns the page's path.

    What is saved already stays: a second run finds everything done, and its seconds say nothing.
    """
    folder = settings().at("reports", f"train-policy-{short(sha256_json([outcome.export, outcome.result]))}")
    if not exists(join(folder, INPUTS_NAME)):
        save_inputs(report_inputs(outcome, folder), folder)
    return str(build("policy", folder))


def report_inputs(outcome: PolicyOutcome, folder: str) -> ReportInputs:
    """Everything the page shows, as addresses and plain values."""
    result = EvaluationResult.parse(read_json(join(outcome.result, RESULT_NAME)))
    configs = {name: read_json(beside(url, "config.json")) for name, url in outcome.trained.items()}
    return ReportInputs(
        title="Policy in closed loop",
        subtitle=f"Method {outcome.method}, export {short(result.model_digest)}",
        sections=POLICY_SECTIONS,
        stages=tuple(Stage(name=name, seconds=seconds) for name, seconds in outcome.seconds.items()),
        runs=tuple(TrainingRun(name=name, metrics=beside(url, METRICS_NAME)) for name, url in outcome.trained.items()),
        policy_result=outcome.result,
        datasets=(data_set(outcome.data),),
        configs=configs | {"rollouts": read_json(join(outcome.result, "config.json"))},
        seeds={
            "training": str(configs[next(iter(configs))].get("seed", "")),
            "evaluation": f"{min(result.seeds)} to {max(result.seeds)}, never seen in training",
        },
        commands=(
            Command(what="this page again", command=f"foreframe report policy {shown(folder)}"),
            Command(what="the gate's verdict", command="foreframe promote"),
            Command(what="the policy behind a socket", command=f"foreframe serve {shown(outcome.export)}"),
            Command(what="the way back to the source videos", command=f"foreframe lineage {shown(outcome.export)}"),
        ),
        **origin(outcome.export, SHOWN_PACKAGES),
    )
