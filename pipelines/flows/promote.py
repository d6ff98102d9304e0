"""`promote`: the gate decides on a candidate, and the alias `champion` moves or it does not."""

from __future__ import annotations

import json
from typing import Any, Literal

from prefect import flow

from evaluation.gate import (
    Decision,
    GateRule,
    calvin_rule,
    decide,
    encoder_rule,
    policy_rule,
    promotion_record,
    training_summary,
    video_rule,
)
from evaluation.result import RESULT_NAME, EvaluationResult
from evaluation.suites import CALVIN
from infra.digests import short
from infra.errors import InputError
from infra.registry import CANDIDATE, CHAMPION, ENCODER, POLICY, RESULT_TAG, VIDEO, ModelVersion, Registry
from infra.settings import settings
from infra.storage import absolute, exists, join, read_bytes, read_json, write_json
from pipelines.flows import STOPS_ITS_JOBS
from pipelines.flows.evaluate import SUITE_OF, evaluate_like
from pipelines.ray_backend import Backend
from pipelines.tasks import FlowRun, logger, tracked
from training.callbacks.metrics_file import METRICS_NAME

ModelName = Literal["foreframe-encoder", "foreframe-video", "foreframe-policy"]
RULES: dict[str, GateRule] = {ENCODER: encoder_rule(), VIDEO: video_rule(), POLICY: policy_rule()}
RECORD_NAME = "promotion.json"


@flow(name="promote", flow_run_name="promote-{model}", **STOPS_ITS_JOBS)
def promote(
    model: ModelName = "foreframe-policy",
    version: int | None = None,
    result: str = "",
    backend: Backend | None = None,
    parent_run: str = "",
) -> dict[str, Any]:
    """Gate a version (default: the candidate) against the champion; returns the decision with its reasons.

    Both are judged on equal seeds and items: a champion that was rated by another protocol is rated again.
    `result` is the evaluation of something that the registry does not hold, such as a policy served elsewhere: it is
    judged by the same rule, and no alias moves.
    """
    with tracked("promote", backend=backend, parent=parent_run) as run:
        registry = Registry(run.tracker)
        if result:
            return judge_foreign(run, registry, model, absolute(result))
        candidate = find_candidate(registry, model, version)
        champion = registry.alias(model, CHAMPION)
        if champion is not None and champion.version == candidate.version:
            reasons = (f"{model} version {candidate.version} is the champion already.", *champion.gate_reasons)
            return announce(run, candidate, Decision(promote=True, reasons=reasons))
        mine = rated(candidate)
        theirs = evaluate_like(run, champion.url, rated_url(candidate)) if champion is not None else None
        decision = judge(candidate, mine, theirs)
        if decision.promote:
            registry.promote(model, candidate.version, reasons=decision.reasons)
        else:
            registry.reject(model, candidate.version, reasons=decision.reasons)
        return announce(run, candidate, decision, champion)


def judge_foreign(run: FlowRun, registry: Registry, model: str, url: str) -> dict[str, Any]:
    """What the gate says of a result whose model is not registered."""
    mine = EvaluationResult.parse(read_json(join(url, RESULT_NAME)))
    champion = registry.alias(model, CHAMPION)
    theirs = evaluate_like(run, champion.url, url) if champion is not None else None
    rule = rule_for(model, mine)
    if theirs is not None:  # arms need training episodes and a blind control, which a foreign policy does not have
        rule = rule.model_copy(update={"floor_arms": tuple(arm for arm in rule.floor_arms if arm in mine.arms)})
    decision = decide(mine, theirs, rule)
    record = promotion_record(decision, mine, theirs, rule)
    write_json(settings().at("promotions", f"{model}-foreign-{short(mine.model_digest)}.json"), record.to_json())
    foreign = ModelVersion(name=model, version=0, export_digest=mine.model_digest, url=mine.model)
    return announce(run, foreign, decision, champion)


def rule_for(model: str, result: EvaluationResult) -> GateRule:
    """What a version must show, which depends on the benchmark it was rated on."""
    return calvin_rule() if result.suite.startswith(CALVIN.name) else RULES[model]


def find_candidate(registry: Registry, model: str, version: int | None) -> ModelVersion:
    """The version asked for, else the one with the alias `candidate`."""
    if version is not None:
        return registry.version(model, version)
    found = registry.alias(model, CANDIDATE)
    if found is None:
        remedy = "Train one first: pretrain-rsp, finetune-tvp or train-policy."
        raise InputError(f"{model} has no candidate.", remedy=remedy)
    return found


def rated_url(candidate: ModelVersion) -> str:
    """Where the candidate's evaluation lies."""
    if url := candidate.tags.get(RESULT_TAG):
        return url
    raise InputError(
        f"{candidate.name} version {candidate.version} was never evaluated.",
        remedy=f"foreframe evaluate {SUITE_OF[candidate.name]} --model {candidate.url}",
    )


def rated(candidate: ModelVersion) -> EvaluationResult:
    """The candidate's evaluation."""
    return EvaluationResult.parse(read_json(join(rated_url(candidate), RESULT_NAME)))


def judge(candidate: ModelVersion, mine: EvaluationResult, theirs: EvaluationResult | None) -> Decision:
    """Apply the model's rule and keep the record beside the candidate's result."""
    rule = rule_for(candidate.name, mine)
    metrics = training_metrics(candidate.url)
    decision = decide(mine, theirs, rule, training_metrics=metrics)
    record = promotion_record(decision, mine, theirs, rule, training_metrics=metrics)
    opponent = short(theirs.model_digest) if theirs else "floors"
    name = f"{candidate.name}-v{candidate.version}-against-{opponent}.json"
    write_json(settings().at("promotions", name), record.to_json())
    return decision


def training_metrics(export: str) -> dict[str, float]:
    """First and last values of the run that made an export; empty for an export from elsewhere."""
    url = join(export.rsplit("/", 1)[0], METRICS_NAME)
    if not exists(url):
        return {}
    return training_summary([json.loads(line) for line in read_bytes(url).splitlines() if line.strip()])


def announce(
    run: FlowRun, candidate: ModelVersion, decision: Decision, champion: ModelVersion | None = None
) -> dict[str, Any]:
    """Say it in the log, on the flow's page, in the tracker."""
    verdict = "promoted" if decision.promote else "refused"
    logger().info("%s version %d is %s: %s", candidate.name, candidate.version, verdict, " ".join(decision.reasons))
    run.table(
        f"gate-{candidate.name}",
        [{"verdict": verdict, "reason": reason} for reason in decision.reasons],
        f"{candidate.name} version {candidate.version}: {verdict}",
    )
    run.run.log_tags({"gate.status": verdict, "gate.model": f"{candidate.name} version {candidate.version}"})
    return {
        "model": candidate.name,
        "version": candidate.version,
        "candidate": candidate.export_digest,
        "champion": champion.export_digest if champion else "",
        "promote": decision.promote,
        "reasons": list(decision.reasons),
    }
