"""Intervals and averages for few, grouped, paired measurements.

Three different questions, three methods: a success count has a Wilson interval; a pooled score a stratified bootstrap
(items resampled within each task, tasks fixed: Agarwal et al. 2021); a difference of two models on equal items the
sign-flip interval, which unlike the bootstrap keeps its error rate at any number of items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from infra.errors import InputError

Values = Sequence[float] | npt.NDArray[np.floating] | npt.NDArray[np.integer] | npt.NDArray[np.bool_]
ByStratum = Mapping[str, Values]
Statistic = Callable[[npt.NDArray[np.float64]], float]
NUM_RESAMPLES = 9_999
MAX_ENUMERATED_ITEMS = 13  # 2^13 subsets are fewer than the drawn ones


class Estimate(NamedTuple):
    """A number with its interval; `low` and `high` are infinite where the items are too few to say anything."""

    value: float
    low: float
    high: float
    num_items: int


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success share (without continuity correction); (0, 1) for n = 0."""
    _check_confidence(confidence)
    if not 0 <= successes <= n:
        raise InputError(f"{successes} successes of {n} attempts is impossible.", remedy="Give 0 <= successes <= n.")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # exact at the ends, where rounding leaves 1e-17
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def interquartile_mean(values: Values) -> float:
    """Mean of the middle half: floor(n / 4) values cut from each end, so the plain mean for n < 4."""
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    if ordered.size == 0:
        raise InputError("interquartile mean of no values.", remedy="Give at least one value.")
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def mean(values: npt.NDArray[np.float64]) -> float:
    """Arithmetic mean, the default statistic."""
    return float(values.mean())


def stratified_bootstrap(
    values_by_stratum: ByStratum,
    statistic: Statistic = mean,
    *,
    num_resamples: int = 2_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Percentile bootstrap of a statistic of the pooled values, items drawn with replacement within each stratum.

    A stratum of one item contributes no spread: group such items into one stratum. With fewer than about ten items
    the interval is too narrow (it cannot see what was never drawn); read it beside `num_items`.
    """
    _check_confidence(confidence)
    strata = _strata(values_by_stratum)
    generator = np.random.Generator(np.random.Philox(seed))
    pooled = np.concatenate(
        [values[generator.integers(values.size, size=(num_resamples, values.size))] for values in strata], axis=1
    )
    draws = pooled.mean(axis=1) if statistic is mean else np.array([statistic(row) for row in pooled])
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    everything = np.concatenate(strata)
    return Estimate(float(statistic(everything)), float(low), float(high), everything.size)


def paired_difference(
    a_by_stratum: ByStratum,
    b_by_stratum: ByStratum,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of a - b over paired items with its sign-flip interval; item i of a stratum pairs with item i of the other.

    The interval holds every shift that the sign-flip test does not reject, which are the quantiles of the means of
    random subsets (Hartigan 1969). If the two models are exchangeable on each item, `low > 0` happens with
    probability at most (1 - confidence) / 2 for any number of items and any kind of metric; for successes it is the
    exact McNemar test. Below 6 items a 95 % interval is infinite on both sides.
    """
    _check_confidence(confidence)
    difference = np.concatenate(_paired_strata(a_by_stratum, b_by_stratum))
    subset_means = _subset_means(difference, num_resamples, seed)
    num_subsets = subset_means.size + 1  # the empty subset agrees with every shift
    rank = math.floor((1 - confidence) / 2 * num_subsets + 1e-9)
    if rank == 0:
        return Estimate(float(difference.mean()), -math.inf, math.inf, difference.size)
    ordered = np.sort(subset_means)
    # The empty subset is the smallest for the lower bound and the largest for the upper one.
    return Estimate(float(difference.mean()), float(ordered[rank - 1]), float(ordered[-rank]), difference.size)


def _subset_means(difference: npt.NDArray[np.float64], num_resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """Means of all non-empty subsets when they are few, else of random ones (each item in or out with 1/2)."""
    inside, sizes = _subsets(difference.size, num_resamples, seed)
    return (inside @ difference) / sizes


@lru_cache(maxsize=2)  # a decision asks for the same items once for each metric and arm
def _subsets(count: int, num_resamples: int, seed: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(0/1 membership (subsets, items), sizes); the empty subset is left out."""
    if count <= MAX_ENUMERATED_ITEMS:
        members = ((np.arange(1, 2**count)[:, None] >> np.arange(count)) & 1).astype(np.uint8)
    else:
        generator = np.random.Generator(np.random.Philox(seed))
        packed = generator.integers(256, size=(num_resamples, (count + 7) // 8), dtype=np.uint8)
        members = np.unpackbits(packed, axis=1, count=count)
    inside = members[members.any(axis=1)].astype(np.float64)
    return inside, inside.sum(axis=1)


def _paired_strata(a_by_stratum: ByStratum, b_by_stratum: ByStratum) -> list[npt.NDArray[np.float64]]:
    if a_by_stratum.keys() != b_by_stratum.keys():
        only = sorted(a_by_stratum.keys() ^ b_by_stratum.keys())
        raise InputError(f"strata {only} exist on one side of a pair only.", remedy="Evaluate both on the same items.")
    pairs = []
    for name in a_by_stratum:
        a, b = _strata({name: a_by_stratum[name]})[0], _strata({name: b_by_stratum[name]})[0]
        if a.size != b.size:
            raise InputError(
                f"stratum {name!r} has {a.size} and {b.size} items.", remedy="Evaluate both on the same items."
            )
        pairs.append(a - b)
    return pairs


def _strata(values_by_stratum: ByStratum) -> list[npt.NDArray[np.float64]]:
    if not values_by_stratum:
        raise InputError("no strata to average over.", remedy="Give at least one stratum with one value.")
    strata = []
    for name, values in values_by_stratum.items():
        array = np.asarray(values, dtype=np.float64).ravel()
        if array.size == 0 or not np.isfinite(array).all():
            raise InputError(f"stratum {name!r} is empty or holds a value that is not finite.")
        strata.append(array)
    return strata


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence} is outside (0, 1).", remedy="Give a share such as 0.95.")
