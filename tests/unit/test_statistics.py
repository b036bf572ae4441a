"""Statistics of measurements against scipy, numpy and cases with a known answer."""

from __future__ import annotations

import itertools
import math
import statistics as stdlib

import numpy as np
import pytest
from scipy import stats

from inferlab.benchmarks.statistics import (
    bootstrap_interval,
    holm,
    mean,
    median,
    permutation_p,
    ratio_of_medians,
    summarize,
)

RNG = np.random.default_rng(7)
SKEWED = RNG.lognormal(0.0, 0.8, size=40)


def test_summary_is_that_of_the_standard_library():
    values = [3.0, 1.0, 2.0, 10.0]
    summary = summarize(values)
    assert summary["mean"] == stdlib.mean(values)
    assert summary["median"] == stdlib.median(values)
    assert summary["std"] == pytest.approx(stdlib.stdev(values), rel=1e-12)
    assert (summary["min"], summary["max"]) == (1.0, 10.0)
    assert summary["raw"] == values
    # Order statistics 1, 2, 3, 10 at 0, 1, 2, 3: the 90th percentile lies at 2.7.
    assert summary["p90"] == pytest.approx(3 + 0.7 * 7)
    assert summary["p99"] == pytest.approx(3 + 0.97 * 7)


def test_one_value_has_no_interval():
    summary = summarize([4.0])
    assert summary["std"] == 0.0
    assert summary["p99"] == 4.0
    assert summary["mean_ci95"] is None
    assert summary["median_ci95"] is None


def test_constant_values_have_an_interval_of_no_width():
    assert summarize([2.0] * 5)["mean_ci95"] == (2.0, 2.0)


@pytest.mark.parametrize(("method", "theirs"), [("percentile", "percentile"), ("bca", "BCa")])
@pytest.mark.parametrize("values", [SKEWED, SKEWED[:8], -SKEWED], ids=["40", "8", "left-skewed"])
def test_interval_is_scipys(method, theirs, values):
    ours = bootstrap_interval(values, mean, method=method, resamples=20_000)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method=theirs, random_state=1
    ).confidence_interval
    width = reference.high - reference.low
    assert ours[0] == pytest.approx(reference.low, abs=0.03 * width)
    assert ours[1] == pytest.approx(reference.high, abs=0.03 * width)


def test_bca_differs_from_percentile_on_skewed_values():
    """Else the test above would not notice a BCa that corrects nothing."""
    bca = bootstrap_interval(SKEWED[:8], mean, method="bca", resamples=20_000)
    percentile = bootstrap_interval(SKEWED[:8], mean, method="percentile", resamples=20_000)
    assert abs(bca[1] - percentile[1]) > 0.06 * (percentile[1] - percentile[0])


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        low, high = bootstrap_interval(
            rng.normal(5.0, 2.0, size=30), mean, resamples=500, seed=trial
        )
        hits += low <= 5.0 <= high
    # 95 % nominal; the bootstrap at n = 30 covers about 93 %. Below 88 % of 300: p < 1e-3.
    assert 0.88 <= hits / 300 <= 0.99


def test_interval_of_the_median_is_that_of_order_statistics():
    """Resampled medians of 1..n have an exact law: P(median <= k) is binomial."""
    n = 21
    low, high = bootstrap_interval(
        np.arange(1.0, n + 1), median, method="percentile", resamples=50_000
    )
    at_most = [1 - stats.binom.cdf(n // 2, n, k / n) for k in range(1, n + 1)]
    assert low == 1 + next(i for i, p in enumerate(at_most) if p >= 0.025)
    assert high == 1 + next(i for i, p in enumerate(at_most) if p >= 0.975)


def test_seed_is_fixed():
    assert bootstrap_interval(SKEWED) == bootstrap_interval(SKEWED)
    assert bootstrap_interval(SKEWED) != bootstrap_interval(SKEWED, seed=1)


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ([], {}, "at least one"),
        ([[1.0]], {}, "shape"),
        ([1.0, math.nan], {}, "finite"),
        ([1.0, math.inf], {}, "finite"),
        ([1.0, 2.0], {"method": "basic"}, "method"),
        ([1.0, 2.0], {"confidence": 1.0}, "confidence"),
        ([1.0, 2.0], {"resamples": 0}, "resamples"),
    ],
)
def test_bad_arguments(values, arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **arguments)


def test_ratio_of_exact_multiples():
    slow = [[2.0, 4.0, 6.0], [20.0, 22.0, 24.0]]
    fast = [[1.0, 2.0, 3.0], [10.0, 11.0, 12.0]]
    result = ratio_of_medians(slow, fast)
    assert result["ratio"] == pytest.approx(2.0)
    assert result["ci95"] == pytest.approx((2.0, 2.0))
    assert result["by_group"] == pytest.approx([2.0, 2.0])


def test_ratio_keeps_pairs_together():
    """A drift that doubles both of a pair leaves the ratio and its interval alone."""
    drift = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    result = ratio_of_medians([3.0 * drift], [drift])
    assert result["ci95"] == pytest.approx((3.0, 3.0))


def test_ratio_interval_of_one_group_is_that_of_its_rounds():
    """Rounds with the constant denominator 1: the interval of a median, known from above."""
    values = np.arange(1.0, 22.0)
    result = ratio_of_medians([values], [np.ones(21)], resamples=50_000)
    expected = bootstrap_interval(values, median, method="percentile", resamples=50_000)
    assert result["ratio"] == 11.0
    assert result["ci95"] == pytest.approx(expected)


def test_ratio_interval_spans_different_groups():
    result = ratio_of_medians([[1.0], [2.0], [3.0]], [[1.0], [1.0], [1.0]])
    assert result["ratio"] == 2.0
    assert result["ci95"] == (1.0, 3.0)
    assert result["by_group"] == [1.0, 2.0, 3.0]


def test_ratio_of_a_single_pair_has_no_interval():
    assert ratio_of_medians([[4.0]], [[2.0]]) == {"ratio": 2.0, "ci95": None, "by_group": [2.0]}


@pytest.mark.parametrize(
    ("numerator", "denominator"),
    [([], []), ([[1.0]], []), ([[1.0]], [[1.0, 2.0]]), ([[0.0]], [[1.0]]), ([[]], [[]])],
)
def test_bad_ratio_arguments(numerator, denominator):
    with pytest.raises(ValueError, match=r"groups|group 0|at least one"):
        ratio_of_medians(numerator, denominator)


def test_ratio_interval_covers_the_ratio_as_often_as_it_says():
    """Prompts are a sample, whose ratios scatter around 1.5."""
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(200):
        base = rng.lognormal(0.0, 0.3, size=(15, 1))
        slow = base * 1.5 * rng.lognormal(0.0, 0.05, size=(15, 5))
        fast = base * rng.lognormal(0.0, 0.05, size=(15, 5))
        low, high = ratio_of_medians(list(slow), list(fast), resamples=400, seed=trial)["ci95"]
        hits += low <= 1.5 <= high
    # A percentile interval of a median over 15 is conservative, if anything.
    assert hits / 200 >= 0.9


def test_what_was_measured_apart_is_resampled_apart():
    drift = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    apart = ratio_of_medians([3.0 * drift], [drift], paired=False)
    assert apart["ratio"] == pytest.approx(3.0)
    assert apart["ci95"][0] < 1.5 < 6.0 < apart["ci95"][1], "rounds are no pairs"
    more = ratio_of_medians([[4.0, 4.0, 4.0]], [[2.0]], paired=False)
    assert more["ratio"] == 2.0
    assert more["ci95"] == (2.0, 2.0)


def test_permutations_of_one_group_are_the_exact_two_sample_test():
    """5 against 5 values that do not mix: all 252 ways to deal them, counted."""
    p = permutation_p([[1.0, 2.0, 3.0, 4.0, 5.0]], [[11.0, 12.0, 13.0, 14.0, 15.0]])
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 11.0, 12.0, 13.0, 14.0, 15.0])
    ways = list(itertools.combinations(range(10), 5))
    gaps = []
    for way in ways:
        rest = [i for i in range(10) if i not in way]
        gaps.append(abs(values[list(way)].mean() - values[rest].mean()))
    exact = sum(gap >= 10 for gap in gaps) / len(ways)
    assert p == pytest.approx(exact, abs=0.003)
    assert exact == 2 / 252


def test_permutations_of_pairs_are_the_sign_flip_test():
    """8 prompts, all slower: of 256 signs, two give as much."""
    before = [[float(i)] for i in range(8)]
    after = [[i + 1.0 + 0.01 * i] for i in range(8)]
    assert permutation_p(after, before) == pytest.approx(2 / 256, abs=0.003)


def test_a_single_pair_says_nothing():
    assert permutation_p([[1.0]], [[9.0]]) == 1.0
    assert permutation_p([[2.0, 2.0]], [[2.0, 2.0]]) == 1.0


def test_p_values_of_no_difference_are_uniform():
    """And so 5 % of them are below 0.05: with differences between prompts far above the noise."""
    rng = np.random.default_rng(5)
    found = []
    for trial in range(200):
        base = rng.normal(0.0, 10.0, size=(6, 1))
        one, other = base + rng.normal(size=(6, 4)), base + rng.normal(size=(6, 4))
        found.append(permutation_p(list(one), list(other), permutations=400, seed=trial))
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) < 0.05) < 0.1


def test_a_difference_beyond_the_noise_is_seen():
    rng = np.random.default_rng(6)
    base = rng.normal(0.0, 10.0, size=(6, 1))
    one, other = base + rng.normal(size=(6, 4)), base + 2.0 + rng.normal(size=(6, 4))
    assert permutation_p(list(one), list(other)) < 0.001


def test_holm_is_the_textbooks():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_alarm():
    rng = np.random.default_rng(8)
    alarms = sum(min(holm(list(rng.random(10)))) < 0.05 for _ in range(2000))
    assert alarms / 2000 < 0.065
    assert sum(rng.random(10).min() < 0.05 for _ in range(200)) / 200 > 0.3, "without it"


@pytest.mark.parametrize(("one", "other"), [([], []), ([[1.0]], []), ([[]], [[1.0]])])
def test_bad_permutation_arguments(one, other):
    with pytest.raises(ValueError, match="at least one"):
        permutation_p(one, other)
