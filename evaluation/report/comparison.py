"""One evaluation result as tables: the model beside its control arms, per task, and paired differences in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluation.report.charts import Interval, interval_chart
from evaluation.report.text import grouped, rate, signed, span
from evaluation.result import EvaluationResult, Item, Score
from evaluation.statistics import Estimate, paired_difference, wilson_interval


@dataclass(frozen=True)
class Cell:
    """A number, its rate and interval, and the share (0-1) that shades it (None: no shade)."""

    main: str
    sub: str = ""
    share: float | None = None
    interval: str = ""


@dataclass(frozen=True)
class Difference:
    """The model minus one arm on equal items, in the direction where a gain is positive."""

    arm: str
    value: float
    low: float
    high: float
    count: int
    metric: str

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `no measurable difference` when the interval includes 0."""
        if not self.has_interval:
            return "too few items"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no measurable difference"

    @property
    def has_interval(self) -> bool:
        """False where the items are too few for any interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def cell(self) -> Cell:
        """The difference with its interval, for a table."""
        interval = f"{signed(self.low)} to {signed(self.high)}" if self.has_interval else "too few items"
        return Cell(signed(self.value), interval=interval)

    @property
    def numbers(self) -> str:
        """The difference with its interval and the number of pairs, as words."""
        words = f"{metric_title(self.metric)} differs by {signed(self.value)}"
        if not self.has_interval:
            return f"{words} over {self.count} pairs, too few for an interval"
        return f"{words} (95 % interval {signed(self.low)} to {signed(self.high)}, {grouped(self.count)} pairs)"


@dataclass(frozen=True)
class ArmRow:
    """One arm over all items: a cell for each metric, and the model's paired difference from it."""

    label: str
    is_model: bool
    count: str
    cells: tuple[Cell, ...]
    difference: Difference | None = None


@dataclass(frozen=True)
class StratumRow:
    """One task or sequence group: the primary metric of each arm."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything the page shows of one result, apart from its pictures."""

    suite: str
    metrics: tuple[str, ...]
    is_rate: bool
    rows: tuple[ArmRow, ...]
    strata: tuple[StratumRow, ...]
    differences: tuple[Difference, ...]
    chart: Markup
    difference_chart: Markup
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Arm:
    label: str
    items: tuple[Item, ...]
    scores: dict[str, Score]
    is_model: bool = False


def arm_title(name: str) -> str:
    """An arm's name as words."""
    words = name.replace("_", " ").replace("-", " ").split()
    return " ".join("RGB" if word == "rgb" else word for word in words) or "unnamed"


def metric_title(name: str) -> str:
    """A metric's name as words."""
    return name.replace("_", " ")


def compare(result: EvaluationResult, *, model_label: str) -> Comparison:
    """Tables and charts of a result: the model first, then its arms from the best to the worst."""
    primary = result.primary_metric
    arms = _arms(result, model_label)
    is_rate = any(arm.scores[primary].successes is not None for arm in arms if primary in arm.scores)
    differences, notes = _differences(result, arms)
    by_arm = {difference.arm: difference for difference in differences}
    metrics = _metrics(result)
    return Comparison(
        suite=f"{result.suite} {result.suite_version}".strip(),
        metrics=tuple(metric_title(name) for name in metrics),
        is_rate=is_rate,
        rows=tuple(_arm_row(arm, metrics, by_arm.get(arm.label)) for arm in arms),
        strata=_strata(arms, primary, is_rate=is_rate),
        differences=tuple(differences),
        chart=_score_chart(arms, primary, is_rate=is_rate),
        difference_chart=_difference_chart(differences, primary),
        notes=tuple(notes),
    )


def random_initialisation(differences: Sequence[Difference]) -> Difference | None:
    """The difference against the arm with untrained weights, if there is one."""
    return next((difference for difference in differences if "random" in difference.arm.lower()), None)


def pretraining_sentence(difference: Difference) -> str:
    """What the paired interval allows to say of pre-training, whichever way it lies."""
    if difference.verdict == "better":
        return f"Pre-training gains over {difference.arm}: {difference.numbers}, all of it above 0."
    if difference.verdict == "worse":
        return f"Pre-training loses against {difference.arm}: {difference.numbers}, all of it below 0."
    reason = "" if not difference.has_interval else ", and the interval includes 0"
    return f"Pre-training shows no measurable gain over {difference.arm} at this scale: {difference.numbers}{reason}."


def _metrics(result: EvaluationResult) -> tuple[str, ...]:
    names = [name for name in result.scores if "/" not in name and name != result.primary_metric]
    return (result.primary_metric, *names)


def _arms(result: EvaluationResult, model_label: str) -> list[_Arm]:
    found = []
    titles = {model_label}
    for name in dict.fromkeys([*result.arms, *result.arm_scores]):
        label = arm_title(name) if arm_title(name) not in titles else f"arm {name}"
        titles.add(label)
        found.append(_Arm(label, result.arms.get(name, ()), result.arm_scores.get(name, {})))
    sign = -1.0 if result.higher_is_better else 1.0

    def rank(arm: _Arm) -> float:
        score = arm.scores.get(result.primary_metric)
        return sign * score.value if score else math.inf

    return [_Arm(model_label, result.items, result.scores, is_model=True), *sorted(found, key=rank)]


def _arm_row(arm: _Arm, metrics: tuple[str, ...], difference: Difference | None) -> ArmRow:
    cells = tuple(_score_cell(arm.scores[name]) if name in arm.scores else Cell("–") for name in metrics)
    return ArmRow(arm.label, arm.is_model, grouped(len(arm.items)), cells, difference)


def _score_cell(score: Score) -> Cell:
    if score.successes is None:
        return Cell(f"{score.value:.3f}", interval=f"{score.low:.3f}–{score.high:.3f}")
    return Cell(f"{score.successes}/{score.count}", rate(score.value), score.value, span(score.low, score.high))


def _strata(arms: list[_Arm], metric: str, *, is_rate: bool) -> tuple[StratumRow, ...]:
    names = dict.fromkeys(item.stratum for arm in arms for item in arm.items)
    return tuple(
        StratumRow(name, tuple(_stratum_cell(arm.items, name, metric, is_rate=is_rate) for arm in arms))
        for name in names
    )


def _stratum_cell(items: tuple[Item, ...], stratum: str, metric: str, *, is_rate: bool) -> Cell:
    values = [item.metrics[metric] for item in items if item.stratum == stratum and metric in item.metrics]
    if not values:
        return Cell("–")
    mean = sum(values) / len(values)
    if not is_rate:
        return Cell(f"{mean:.3f}", interval=f"n = {len(values)}")
    successes = sum(value > 0.5 for value in values)
    low, high = wilson_interval(successes, len(values))
    return Cell(f"{successes}/{len(values)}", share=mean, interval=f"{100 * low:.0f}–{100 * high:.0f} %")


def _differences(result: EvaluationResult, arms: list[_Arm]) -> tuple[list[Difference], list[str]]:
    found, notes = [], []
    for arm in arms[1:]:
        difference = difference_from(result, arm.items, label=arm.label)
        if difference:
            found.append(difference)
        elif not any(result.primary_metric in item.metrics for item in arm.items):
            notes.append(f"{arm.label} has no {metric_title(result.primary_metric)}, hence no paired difference.")
        else:
            notes.append(f"{arm.label}: no item in common with the model, hence no paired difference.")
    return found, notes


def difference_from(result: EvaluationResult, others: Sequence[Item], *, label: str) -> Difference | None:
    """The model minus an arm's items on the primary metric, in the good direction; None without a common item."""
    metric, sign = result.primary_metric, 1.0 if result.higher_is_better else -1.0
    own = {item.item_id: item for item in result.items if metric in item.metrics}
    pairs = [(own[item.item_id], item) for item in others if item.item_id in own and metric in item.metrics]
    return Difference(label, *_paired(pairs, metric, sign), metric=metric) if pairs else None


def _paired(pairs: list[tuple[Item, Item]], metric: str, sign: float) -> Estimate:
    mine: dict[str, list[float]] = {}
    other: dict[str, list[float]] = {}
    for own, arm in pairs:
        mine.setdefault(own.stratum, []).append(sign * own.metrics[metric])
        other.setdefault(own.stratum, []).append(sign * arm.metrics[metric])
    return paired_difference(mine, other)


def _score_chart(arms: list[_Arm], metric: str, *, is_rate: bool) -> Markup:
    rows = [
        Interval(arm.label, score.value, score.low, score.high, _short(score), arm.is_model)
        for arm in arms
        if (score := arm.scores.get(metric))
    ]
    return interval_chart(
        rows, title=f"{metric_title(metric)} of each arm", bounds=(0.0, 1.0) if is_rate else None, percent=is_rate
    )


def _short(score: Score) -> str:
    return rate(score.value) if score.successes is not None else f"{score.value:.3f}"


def _difference_chart(differences: Sequence[Difference], metric: str) -> Markup:
    rows = [
        Interval(row.arm, row.value, row.low, row.high, signed(row.value)) for row in differences if row.has_interval
    ]
    if not rows:
        return Markup("")
    bounds = (min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows)))
    return interval_chart(rows, title=f"paired difference of {metric_title(metric)}", bounds=bounds)
