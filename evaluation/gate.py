"""The promotion gate: a pure function of two results and a rule, with a plain sentence for every reason.

A candidate is promoted when it passes every floor of the rule and, if there is a champion, its paired difference on
the primary metric has an interval above the rule's margin and no guarded metric falls by more than the rule allows.
If candidate and champion are exchangeable, the interval lies above 0 with probability at most
(1 - confidence) / 2, at any number of items and for any kind of metric (`evaluation.statistics.paired_difference`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from evaluation.result import EvaluationResult, Item
from evaluation.statistics import Estimate, paired_difference
from infra.config import Config
from infra.digests import sha256_json, short
from infra.errors import InputError

FUTURE_LOSS = "loss_future"
FIRST, LAST = "first/", "last/"
POLICY_FLOORS = ("random-actions", "mean-demonstration", "proprioception", "other-episode")
VIDEO_FLOORS = ("copy-first-frame",)


class Guard(Config):
    """A metric that must not fall: refused when its mean paired difference is worse than `-max_regression`."""

    metric: str
    max_regression: float = Field(ge=0)
    higher_is_better: bool = True


class GateRule(Config):
    """What a candidate must show. The defaults ask only to beat the champion; see the rules of each model below."""

    confidence: float = Field(default=0.95, gt=0, lt=1)  # of the two-sided intervals
    margin: float = Field(default=0.0, ge=0)  # the interval of candidate minus champion must lie above this
    guards: tuple[Guard, ...] = ()
    floor_arms: tuple[str, ...] = ()  # control arms the candidate must beat, interval above `floor_margin`
    floor_margin: float = Field(default=0.0, ge=0)
    floor_value: float | None = None  # the interval of the primary metric itself must lie above this
    training_loss: str = ""  # a training metric that must have fallen; empty: not asked for
    max_loss_share: float = Field(default=0.75, gt=0)  # of its start


class Measurement(Config):
    """A mean paired difference with its interval; `None` where the items are too few for a bound."""

    value: float
    low: float | None
    high: float | None
    num_items: int


class Decision(Config):
    """The verdict with its reasons: every failed check when refused, every passed check when promoted."""

    promote: bool
    reasons: tuple[str, ...]
    measurements: dict[str, Measurement] = Field(default_factory=dict)


class PromotionRecord(Config):
    """What is kept of a decision: everything needed to make it again."""

    id: str
    decision: Decision
    rule: GateRule
    candidate_digest: str  # sha256 of the candidate's result
    champion_digest: str  # of the champion's result, empty for a first version
    training_metrics: dict[str, float] = Field(default_factory=dict)
    inputs: tuple[str, ...]


def policy_rule() -> GateRule:
    """Floors of a policy: above every control arm; success at the last step must not fall by more than 5 points."""
    return GateRule(floor_arms=POLICY_FLOORS, guards=(Guard(metric="success_last", max_regression=0.05),))


def calvin_rule() -> GateRule:
    """Floor of a policy on CALVIN, which has no control arms: it solves tasks at all; first tasks must not suffer."""
    return GateRule(floor_value=0.0, guards=(Guard(metric="success_1", max_regression=0.05),))


def encoder_rule() -> GateRule:
    """Floors of an encoder: finite metrics and a future loss of at most 0.75 of its start; arms are only reported."""
    guards = tuple(Guard(metric=metric, max_regression=0.02) for metric in ("J", "F"))
    return GateRule(training_loss=FUTURE_LOSS, guards=guards)


def video_rule() -> GateRule:
    """Floor of a video model: a lower loss than copying the first frame; PSNR must not fall by more than 0.5 dB.

    The loss lives in the latents of the model's own autoencoder, so two models with different ones compare only with
    that guard in pixels beside it.
    """
    return GateRule(floor_arms=VIDEO_FLOORS, guards=(Guard(metric="psnr", max_regression=0.5),))


def training_summary(rows: Sequence[Mapping[str, Any]], *, last_share: float = 0.1) -> dict[str, float]:
    """`first/NAME` (first row) and `last/NAME` (mean of the last tenth) of every number in `metrics.jsonl`.

    Values that are not finite are kept: they are what the gate looks for.
    """
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                columns.setdefault(name, []).append(float(value))
    summary = {}
    for name, values in columns.items():
        tail = values[-max(1, round(len(values) * last_share)) :]
        summary[FIRST + name] = values[0]
        summary[LAST + name] = sum(tail) / len(tail)
    return summary


def decide(
    candidate: EvaluationResult,
    champion: EvaluationResult | None,
    rule: GateRule,
    *,
    training_metrics: Mapping[str, float] | None = None,
) -> Decision:
    """Promote or refuse. `training_metrics` are those of the candidate's run, as `training_summary` gives them."""
    judge = _Judge(candidate, rule)
    judge.check_training(training_metrics)
    judge.check_floors()
    if champion is None:
        judge.accept("There is no champion yet, so the floors alone decide.")
    elif not judge.find_mismatches(champion):
        judge.check_champion(champion)
    return judge.verdict()


def promotion_record(
    decision: Decision,
    candidate: EvaluationResult,
    champion: EvaluationResult | None,
    rule: GateRule,
    *,
    training_metrics: Mapping[str, float] | None = None,
) -> PromotionRecord:
    """The record of a decision; its id is the sha256 of its content."""
    candidate_digest = sha256_json(candidate.to_json())
    champion_digest = sha256_json(champion.to_json()) if champion else ""
    body = {
        "decision": decision.to_json(),
        "rule": rule.to_json(),
        "candidate_digest": candidate_digest,
        "champion_digest": champion_digest,
        "training_metrics": {k: v for k, v in (training_metrics or {}).items() if math.isfinite(v)},
        "inputs": [digest for digest in (candidate_digest, champion_digest, candidate.model_digest) if digest],
    }
    return PromotionRecord.parse(body | {"id": sha256_json(body)})


class _Judge:
    """Collects passed and failed checks; one failed check refuses."""

    def __init__(self, candidate: EvaluationResult, rule: GateRule) -> None:
        self._candidate = candidate
        self._rule = rule
        self._passed: list[str] = []
        self._failed: list[str] = []
        self._measurements: dict[str, Measurement] = {}

    def accept(self, reason: str) -> None:
        self._passed.append(reason)

    def refuse(self, reason: str) -> None:
        self._failed.append(reason)

    def require(self, holds: bool, reason: str) -> None:
        (self.accept if holds else self.refuse)(reason)

    def verdict(self) -> Decision:
        promote = not self._failed
        reasons = tuple(self._passed if promote else self._failed)
        return Decision(promote=promote, reasons=reasons, measurements=self._measurements)

    def check_training(self, metrics: Mapping[str, float] | None) -> None:
        """Finite metrics, and the named loss down to the rule's share of its start."""
        name = self._rule.training_loss
        broken = sorted(key for key, value in (metrics or {}).items() if not math.isfinite(value))
        if broken:
            self.refuse(f"Training metrics are not finite: {', '.join(broken)}.")
        if not name:
            return
        start, end = ((metrics or {}).get(prefix + name) for prefix in (FIRST, LAST))
        if start is None or end is None:
            self.refuse(f"The training run reports no {name}, which the rule asks for.")
        elif math.isfinite(start) and math.isfinite(end):
            allowed = self._rule.max_loss_share * start
            verb = "is at most" if end <= allowed else "is above"
            text = f"{name} went from {start:.3f} to {end:.3f}, which {verb} {self._rule.max_loss_share:g} of its start"
            self.require(end <= allowed, f"{text} ({allowed:.3f}).")

    def check_floors(self) -> None:
        """The interval of the candidate minus each control arm lies above the floor margin."""
        if not self._candidate.items:
            self.refuse("The candidate's result has no items.")
            return
        if self._rule.floor_value is not None:
            self._check_value(self._rule.floor_value)
        for arm in self._rule.floor_arms:
            items = self._candidate.arms.get(arm)
            if items is None:
                self.refuse(f"The control arm {arm!r}, which the rule asks for, was not evaluated.")
            else:
                name, metric = f"floor/{arm}", self._candidate.primary_metric
                self._require_above(name, f"the arm {arm!r}", items, metric, self._rule.floor_margin)

    def _check_value(self, floor: float) -> None:
        name, score = self._candidate.primary_metric, self._candidate.scores.get(self._candidate.primary_metric)
        if score is None:
            self.refuse(f"The candidate's result has no score {name!r}.")
            return
        verb = "lies above" if score.low > floor else "does not lie above"
        interval = f"{score.low:.3f} to {score.high:.3f}, {score.count} items"
        self.require(score.low > floor, f"{name} is {score.value:.3f} (interval {interval}), which {verb} {floor:g}.")

    def find_mismatches(self, champion: EvaluationResult) -> bool:
        """Refuse two results that were not measured on the same things; True if there is any mismatch."""
        ours, theirs = self._candidate, champion
        before = len(self._failed)
        for what in ("suite", "suite_version", "primary_metric", "higher_is_better", "data_digest"):
            mine, yours = getattr(ours, what), getattr(theirs, what)
            if mine != yours:
                self.refuse(f"Candidate and champion differ in {what.replace('_', ' ')}: {mine} and {yours}.")
        if ours.seeds != theirs.seeds:
            self.refuse(
                f"Candidate and champion were evaluated on different seeds: {_seeds(ours)} and {_seeds(theirs)}."
            )
        if difference := _item_mismatch(ours.items, theirs.items):
            self.refuse(f"Candidate and champion were not evaluated on equal items: {difference}.")
        if ours.model_digest == theirs.model_digest:
            self.refuse(f"The candidate is the champion (digest {short(ours.model_digest)}).")
        return len(self._failed) > before

    def check_champion(self, champion: EvaluationResult) -> None:
        """The primary metric is measurably better and no guarded metric falls too far."""
        primary = self._candidate.primary_metric
        self._require_above(f"champion/{primary}", "the champion", champion.items, primary, self._rule.margin)
        for guard in self._rule.guards:
            estimate = self._difference(champion.items, guard.metric, higher_is_better=guard.higher_is_better)
            if estimate is None:
                continue
            self._measurements[f"guard/{guard.metric}"] = _measurement(estimate)
            fine = estimate.value >= -guard.max_regression - 1e-12
            verb = "within" if fine else "beyond"
            self.require(
                fine,
                f"Guarded {guard.metric} gains {estimate.value:+.3f} against the champion, {verb} the allowed "
                f"fall of {guard.max_regression:.3f}.",
            )

    def _require_above(self, name: str, opponent: str, items: Sequence[Item], metric: str, margin: float) -> None:
        estimate = self._difference(items, metric, higher_is_better=self._candidate.higher_is_better)
        if estimate is None:
            return
        self._measurements[name] = _measurement(estimate)
        level = f"{100 * self._rule.confidence:g} %"
        start = f"{metric} against {opponent} gains {estimate.value:+.3f}"
        if not math.isfinite(estimate.low):
            self.refuse(f"{start}, but {estimate.num_items} paired items are too few for a {level} interval.")
            return
        interval = f"{level} interval {estimate.low:+.3f} to {estimate.high:+.3f}, {estimate.num_items} paired items"
        verdict = "above" if estimate.low > margin else "not above"
        self.require(estimate.low > margin, f"{start} ({interval}): the interval is {verdict} {margin:g}.")

    def _difference(self, others: Sequence[Item], metric: str, *, higher_is_better: bool) -> Estimate | None:
        """Candidate minus others in the good direction; None, with a reason, when they cannot be paired."""
        mine = self._candidate.items
        if mismatch := _item_mismatch(mine, others):
            self.refuse(f"{metric} cannot be paired: {mismatch}.")
            return None
        lacking = sorted({item.item_id for item in (*mine, *others) if metric not in item.metrics})
        if lacking:
            self.refuse(f"The metric {metric!r} is missing from {len(lacking)} items, e.g. {lacking[0]!r}.")
            return None
        theirs = {item.item_id: item for item in others}
        sign = 1.0 if higher_is_better else -1.0
        a: dict[str, list[float]] = {}
        b: dict[str, list[float]] = {}
        for item in sorted(mine, key=lambda item: item.item_id):  # the drawn subsets must not depend on the order
            a.setdefault(item.stratum, []).append(sign * item.metrics[metric])
            b.setdefault(item.stratum, []).append(sign * theirs[item.item_id].metrics[metric])
        try:
            return paired_difference(a, b, confidence=self._rule.confidence)
        except InputError as error:
            self.refuse(f"{metric} cannot be compared: {error}")
            return None


def _item_mismatch(mine: Sequence[Item], others: Sequence[Item]) -> str:
    """Words for why two item lists do not pair one to one; empty when they do."""
    ids, other_ids = [item.item_id for item in mine], [item.item_id for item in others]
    for side in (ids, other_ids):
        if len(set(side)) != len(side):
            twice = next(name for name in side if side.count(name) > 1)
            return f"item {twice!r} occurs more than once"
    if only := sorted(set(ids) ^ set(other_ids)):
        return f"{len(only)} of {len(set(ids) | set(other_ids))} items are on one side only, e.g. {only[0]!r}"
    return ""


def _seeds(result: EvaluationResult) -> str:
    if not result.seeds:
        return "none"
    return f"{len(result.seeds)} from {min(result.seeds)} to {max(result.seeds)}"


def _measurement(estimate: Estimate) -> Measurement:
    low, high = (bound if math.isfinite(bound) else None for bound in (estimate.low, estimate.high))
    return Measurement(value=estimate.value, low=low, high=high, num_items=estimate.num_items)
