"""Distances, bounds and tests of samples, on distributions whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from inferlab.certify.statistics import (
    divergence,
    kl_interval,
    pearson,
    share_interval,
    total_variation,
    tv_interval,
)

P = np.array([0.5, 0.3, 0.15, 0.05])
Q = np.array([0.4, 0.4, 0.1, 0.1])
TRIALS = 300


def samples(law: np.ndarray, n: int) -> np.ndarray:
    return np.random.default_rng(5).multinomial(n, law, size=TRIALS)


def test_distances():
    assert total_variation(P, Q) == pytest.approx(0.15)
    assert total_variation([1, 0], [0, 1]) == 1
    assert divergence(P, Q) == pytest.approx(scipy.stats.entropy(P, Q))
    assert divergence(P, P) == 0
    assert divergence([0.5, 0.5], [1, 0]) == math.inf


@pytest.mark.parametrize("n", [20, 400, 10_000])
@pytest.mark.parametrize("law", [P, Q])
def test_the_total_variation_lies_in_its_interval(n, law):
    """At 90 %, so that a bound which is wrong would show; it holds more often than it says."""
    missed = 0
    for counts in samples(law, n):
        low, high = tv_interval(counts, P, 0.9)
        missed += not low <= total_variation(law, P) <= high
    assert missed <= 0.1 * TRIALS


def test_the_interval_of_the_total_variation_closes_in():
    counts = samples(Q, 1_000_000)[0]
    low, high = tv_interval(counts, P)
    assert 0.14 < low < 0.15 < high < 0.153


def test_no_samples_say_nothing():
    assert tv_interval([0, 0], [0.5, 0.5]) == (0, 1)
    assert kl_interval([0, 0], [0.5, 0.5]) == (math.inf, (0, math.inf))
    assert share_interval(0, 0) == (0, 1)


def test_the_divergence_lies_in_its_interval():
    truth = divergence(Q, P)
    found = [kl_interval(counts, P, 0.9, seed=i) for i, counts in enumerate(samples(Q, 2000)[:80])]
    assert sum(low <= truth <= high for _, (low, high) in found) >= 62
    # The plug-in estimate alone would be too large by 3 / 2n on average.
    few = [kl_interval(counts, P)[0] for counts in samples(Q, 60)]
    plug_in = np.mean([divergence(counts / 60, P) for counts in samples(Q, 60)])
    assert abs(np.mean(few) - truth) < abs(plug_in - truth) / 2


def test_what_cannot_come_is_infinitely_far():
    assert kl_interval([9, 1], [1.0, 0.0])[0] == math.inf
    assert pearson([9, 1], [1.0, 0.0]).p_value == 0


def test_pearson_is_scipys():
    counts = samples(P, 500)[0]
    expected = scipy.stats.chisquare(counts, P * 500)
    found = pearson(counts, P)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.cells == 4


def test_p_values_are_uniform_and_small_for_another_law():
    right = [pearson(counts, P).p_value for counts in samples(P, 2000)]
    assert scipy.stats.kstest(right, "uniform").pvalue > 1e-3
    assert max(pearson(counts, P).p_value for counts in samples(Q, 2000)) < 1e-6


def test_cells_with_little_in_them_are_put_together():
    law = np.array([0.5, 0.49, *[0.001] * 10])
    assert pearson(np.round(law * 1000), law).cells == 3
    # What is put together is still too little: the next one joins it.
    assert pearson([60, 37, 1, 2], [0.6, 0.37, 0.01, 0.02]).cells == 2
    assert pearson([7], [1.0]).p_value == 1


@pytest.mark.parametrize(("hits", "total"), [(0, 9), (3, 9), (9, 9), (480, 1000)])
def test_shares_are_wilsons(hits, total):
    expected = scipy.stats.binomtest(hits, total).proportion_ci(0.99, method="wilson")
    assert share_interval(hits, total, 0.99) == pytest.approx((expected.low, expected.high))
