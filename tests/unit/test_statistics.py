"""Intervals against published figures, scipy, and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import interquartile_mean, paired_difference, stratified_bootstrap, wilson_interval
from infra.errors import InputError


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(9, 10, 59.6, 98.2), (45, 50, 78.6, 95.7), (0, 20, 0.0, 16.1), (20, 20, 83.9, 100.0)],
)
def test_wilson_reproduces_published_intervals(successes, n, low, high):
    assert wilson_interval(successes, n) == (pytest.approx(low / 100, abs=5e-4), pytest.approx(high / 100, abs=5e-4))


def test_wilson_is_scipys_at_any_confidence():
    for n in (1, 7, 120):
        for successes in range(0, n + 1, max(1, n // 6)):
            theirs = stats.binomtest(successes, n).proportion_ci(0.9, method="wilson")
            assert wilson_interval(successes, n, 0.9) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_nothing_says_nothing_and_impossible_counts_are_refused():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError, match="3 successes of 2"):
        wilson_interval(3, 2)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 11, 100])
def test_interquartile_mean_is_the_quarter_trimmed_mean(n):
    values = np.random.default_rng(n).lognormal(size=n)
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25), rel=1e-14)


def test_bootstrap_resamples_within_strata_only():
    # Between-stratum spread is huge, within-stratum spread nil: no resample may mix the strata.
    estimate = stratified_bootstrap({"easy": [100.0] * 10, "hard": [0.0] * 30})
    assert estimate == (25.0, 25.0, 25.0, 40)


def test_bootstrap_takes_any_statistic_and_is_a_function_of_its_seed():
    values = {"a": np.random.default_rng(0).normal(size=40), "b": np.random.default_rng(1).normal(2, 1, size=24)}
    first = stratified_bootstrap(values, interquartile_mean, num_resamples=300, seed=3)
    assert first == stratified_bootstrap(values, interquartile_mean, num_resamples=300, seed=3)
    assert first != stratified_bootstrap(values, interquartile_mean, num_resamples=300, seed=4)
    assert first.value == pytest.approx(stats.trim_mean(np.concatenate(list(values.values())), 0.25))
    assert first.low < first.value < first.high


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(11)
    hits = 0
    for trial in range(400):
        strata = {"a": generator.exponential(1.0, 30), "b": generator.normal(3.0, 2.0, 30)}
        estimate = stratified_bootstrap(strata, num_resamples=400, seed=trial, confidence=0.9)
        hits += estimate.low <= 2.0 <= estimate.high
    assert 0.85 <= hits / 400 <= 0.94


def test_paired_difference_of_successes_is_the_exact_mcnemar_test():
    generator = np.random.default_rng(5)
    for better, worse, same in [(6, 0, 0), (5, 0, 20), (9, 1, 3), (8, 2, 0), (10, 2, 1), (12, 4, 200), (21, 8, 40)]:
        difference = generator.permutation([1.0] * better + [-1.0] * worse + [0.0] * same)
        estimate = paired_difference({"t": difference}, {"t": np.zeros(difference.size)}, num_resamples=40_000)
        p_one_sided = stats.binomtest(better, better + worse, alternative="greater").pvalue
        assert abs(p_one_sided - 0.025) > 0.004, "too near the level for drawn subsets to decide"
        assert (estimate.low > 0) == (p_one_sided <= 0.025), (better, worse, same)
        assert estimate.value == pytest.approx((better - worse) / difference.size)


def test_paired_difference_agrees_with_scipys_sign_flips_at_every_shift():
    difference = np.random.default_rng(2).normal(0.4, 1.0, size=10)
    estimate = paired_difference({"t": difference}, {"t": np.zeros(10)})
    for bound, alternative in ((estimate.low, "greater"), (estimate.high, "less")):
        outside = -1 if alternative == "greater" else 1
        for shift, rejected in ((bound + outside * 1e-6, True), (bound - outside * 1e-6, False)):
            test = stats.permutation_test(
                (difference - shift,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative=alternative
            )
            assert (test.pvalue <= 0.025) == rejected


def test_paired_difference_needs_six_items_and_equal_items():
    five = paired_difference({"t": [1.0] * 5}, {"t": [0.0] * 5})
    assert (five.value, five.low, five.high) == (1.0, -math.inf, math.inf)
    assert paired_difference({"t": [1.0] * 6}, {"t": [0.0] * 6}).low == 1.0
    with pytest.raises(InputError, match="'t' has 2 and 3 items"):
        paired_difference({"t": [1.0, 2.0]}, {"t": [1.0, 2.0, 3.0]})
    with pytest.raises(InputError, match="one side"):
        paired_difference({"t": [1.0]}, {"u": [1.0]})
    with pytest.raises(InputError, match="not finite"):
        paired_difference({"t": [math.nan]}, {"t": [1.0]})


@pytest.mark.parametrize("count", [6, 9, 14, 40])
def test_paired_difference_covers_a_true_shift_at_any_number_of_items(count):
    generator = np.random.default_rng(count)
    hits = 0
    for trial in range(600):
        a = 0.3 + generator.standard_t(3, size=count)
        estimate = paired_difference({"t": a}, {"t": np.zeros(count)}, num_resamples=1_999, seed=trial)
        hits += estimate.low <= 0.3 <= estimate.high
    assert hits / 600 >= 0.93
