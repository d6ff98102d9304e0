"""What an ablation came to, as data and as a table: ours with intervals, the paper's number beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from evaluation.published import load_table
from evaluation.result import EvaluationResult, Item
from evaluation.statistics import paired_difference
from infra.config import Config
from infra.storage import exists, join, read_json
from training.recipes.ablations_vpp import Ablation

HEAD = """# Ablations of the Video Prediction Policy, preset `{preset}`

Success within the step limit, 95 % Wilson interval; difference to the full run on equal seeds, paired 95 % interval.
The paper's column is another simulator, another size and another metric (average length of five CALVIN tasks, or what
its table says): it tells which way the paper's ablation went, not what this one should give. A number marked ? is not
confirmed by a second source.

"""


class AblationOutcome(Config):
    """One row: the primary score with its interval, its paired difference to the full run, seconds a decision."""

    name: str
    says: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 0
    difference: tuple[float, float, float] | None = None  # value, low, high
    decision_ms: float | None = None
    paper: str = ""
    result: str = ""
    reason: str = ""  # why it was not run


def outcome_of(
    row: Ablation,
    result: EvaluationResult | None,
    url: str | None,
    *,
    full: EvaluationResult | None = None,
    reason: str = "",
) -> AblationOutcome:
    """The record of a row; without a result it holds the reason."""
    paper = published_value(row.published)
    if result is None or url is None:
        return AblationOutcome(name=row.name, says=row.says, paper=paper, reason=reason)
    score = result.scores[result.primary_metric]
    return AblationOutcome(
        name=row.name,
        says=row.says,
        value=score.value,
        low=score.low,
        high=score.high,
        count=score.count,
        difference=None if full is None or full is result else difference(result, full),
        decision_ms=decision_ms(url),
        paper=paper,
        result=url,
    )


def difference(result: EvaluationResult, full: EvaluationResult) -> tuple[float, float, float] | None:
    """Row minus full run on the primary metric, paired by item; None where the items are too few for an interval."""
    estimate = paired_difference(
        _by_stratum(result.items, result.primary_metric), _by_stratum(full.items, full.primary_metric)
    )
    return (estimate.value, estimate.low, estimate.high) if math.isfinite(estimate.low) else None


def published_value(key: str) -> str:
    """The paper's number of TABLE/ROW as text, marked ? where it is not confirmed; empty when the paper has none."""
    if not key:
        return ""
    table_id, name = key.split("/", 1)
    table = load_table(table_id)
    found = table.row(name).values[table.primary]
    return f"{found.value}{'' if found.confirmed else ' ?'} ({table.primary.replace('_', ' ')})"


def decision_ms(url: str) -> float | None:
    """Median milliseconds of one decision for one observation, where the evaluation measured it."""
    place = join(url, "latency.json")
    if not exists(place):
        return None
    single = read_json(place).get("single", {})
    return 1e3 * float(single["median_s"]) if "median_s" in single else None


def rows_beside(outcomes: Sequence[AblationOutcome]) -> list[dict[str, Any]]:
    """One dictionary a row, numbers as text."""
    return [
        {
            "row": item.name,
            "what changes": item.says,
            "success": ""
            if item.value is None
            else f"{item.value:.3f} [{item.low:.3f}, {item.high:.3f}] n = {item.count}",
            "against full": "" if item.difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*item.difference),
            "ms a decision": "" if item.decision_ms is None else f"{item.decision_ms:.1f}",
            "paper": item.paper,
            "not run": item.reason,
        }
        for item in outcomes
    ]


def as_markdown(outcomes: Sequence[AblationOutcome], *, preset: str) -> str:
    """The page that the flow leaves."""
    rows = rows_beside(outcomes)
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(row[column]).replace('|', '/') for column in columns)} |" for row in rows]
    return HEAD.format(preset=preset) + "\n".join(lines) + "\n"


def _by_stratum(items: Sequence[Item], metric: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for item in sorted(items, key=lambda item: item.item_id):
        found.setdefault(item.stratum, []).append(item.metrics[metric])
    return found
