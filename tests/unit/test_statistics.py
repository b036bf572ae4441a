"""Statistics of measurements against scipy, numpy and cases with a known answer."""

from __future__ import annotations

import math
import statistics as stdlib

import numpy as np
import pytest
from scipy import stats

from inferlab.benchmarks.statistics import (
    bootstrap_interval,
    mean,
    median,
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
