"""Scores of rollouts: success with Wilson intervals, interquartile mean, splits by difficulty, paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from evaluation.result import Item, Score
from evaluation.rollouts.records import SUCCESS_EVER, SUCCESS_LAST
from evaluation.statistics import interquartile_mean, paired_difference, stratified_bootstrap, wilson_interval
from ingest.simulators.difficulty import SPLITS, tasks_of


def scores_of(items: Iterable[Item]) -> dict[str, Score]:
    """Success shares: pooled under the metric's name, per task under `metric/task`, and aggregates of success "ever".

    `split/easy` and so on where the tasks span more than one level of difficulty; `iqm/success_ever` is the mean of the
    middle half of all episodes, its interval a stratified bootstrap (episodes within tasks).
    """
    items = tuple(items)
    groups: dict[str, list[float]] = {}
    for item in items:
        for metric in (SUCCESS_EVER, SUCCESS_LAST):
            if metric in item.metrics:
                groups.setdefault(metric, []).append(item.metrics[metric])
                groups.setdefault(f"{metric}/{item.stratum}", []).append(item.metrics[metric])
    scores = {name: share(values) for name, values in sorted(groups.items(), key=lambda group: "/" in group[0])}
    return scores | _by_split(items) | _interquartile(items)


def differences(items: Sequence[Item], arms: Mapping[str, Sequence[Item]]) -> dict[str, Score]:
    """`difference/ARM`: success "ever" of the policy minus that of each arm on equal seeds, sign-flip intervals."""
    found = {}
    mine = _by_stratum(items)
    for name, others in arms.items():
        estimate = paired_difference(mine, _by_stratum(others))
        if math.isfinite(estimate.low):
            found[f"difference/{name}"] = Score(
                value=estimate.value,
                low=estimate.low,
                high=estimate.high,
                count=estimate.num_items,
                method="paired sign-flip",
            )
    return found


def share(values: Sequence[float]) -> Score:
    """Successes of all, with their Wilson interval."""
    successes, count = sum(value > 0.5 for value in values), len(values)
    low, high = wilson_interval(successes, count)
    return Score(value=successes / count, low=low, high=high, count=count, successes=successes, method="wilson")


def _by_split(items: Sequence[Item]) -> dict[str, Score]:
    found = {}
    for split in SPLITS:
        tasks = tasks_of(split)
        values = [item.metrics[SUCCESS_EVER] for item in items if item.stratum in tasks]
        if values and len(values) < len(items):
            found[f"split/{split}"] = share(values)
    return found


def _interquartile(items: Sequence[Item]) -> dict[str, Score]:
    if not items:
        return {}
    estimate = stratified_bootstrap(_by_stratum(items), interquartile_mean)
    return {
        f"iqm/{SUCCESS_EVER}": Score(
            value=estimate.value,
            low=estimate.low,
            high=estimate.high,
            count=estimate.num_items,
            method="interquartile mean, stratified bootstrap",
        )
    }


def _by_stratum(items: Sequence[Item]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for item in sorted(items, key=lambda item: item.item_id):
        found.setdefault(item.stratum, []).append(item.metrics[SUCCESS_EVER])
    return found
