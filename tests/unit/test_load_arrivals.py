"""Arrivals: their rates and spreads are what was asked, their shards make up the whole."""

from __future__ import annotations

from itertools import chain, islice, pairwise

import numpy as np
import pytest
from scipy import stats

from inferlab.load.arrivals import Arrivals, ramp_time, shard

MANY = 20_000


def first(arrivals: Arrivals, count: int) -> list[float]:
    return list(islice(arrivals.times(), count))


def gaps(arrivals: Arrivals) -> np.ndarray:
    return np.diff(first(arrivals, MANY), prepend=0.0)


def test_a_constant_rate_is_a_comb():
    assert first(Arrivals("constant", rate=4), 5) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_bursts_come_together_at_the_rate_asked():
    assert first(Arrivals("burst", rate=6, burst=3), 7) == [0, 0, 0, 0.5, 0.5, 0.5, 1.0]


def test_poisson_gaps_are_exponential():
    found = gaps(Arrivals("poisson", rate=5, seed=3))
    assert stats.kstest(found, "expon", args=(0, 1 / 5)).pvalue > 0.01


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_mean_and_spread(shape):
    found = gaps(Arrivals("gamma", rate=5, shape=shape, seed=1))
    assert stats.kstest(found, "gamma", args=(shape, 0, 1 / (5 * shape))).pvalue > 0.01
    assert found.mean() == pytest.approx(0.2, rel=0.05)
    assert found.std() / found.mean() == pytest.approx(shape**-0.5, rel=0.05)


def test_gamma_of_shape_one_is_poisson_and_a_seed_is_a_load():
    poisson = first(Arrivals("poisson", rate=5, seed=1), 600)
    assert poisson == first(Arrivals("gamma", rate=5, shape=1.0, seed=1), 600)
    assert poisson != first(Arrivals("poisson", rate=5, seed=2), 600)
    assert all(sooner <= later for sooner, later in pairwise(poisson))


@pytest.mark.parametrize(("rate", "end"), [(1.0, 9.0), (9.0, 1.0), (5.0, 5.0)])
def test_a_ramp_has_the_integral_of_its_rate(rate, end):
    over = 10.0
    for count in range(0, 50):
        at = ramp_time(count, rate, end, over)
        assert 0 <= at <= over
        assert rate * at + (end - rate) * at**2 / (2 * over) == pytest.approx(count, abs=1e-9)
    assert ramp_time(50, rate, end, over) == pytest.approx(over)
    assert ramp_time(53, rate, end, over) == pytest.approx(over + 3 / end)


def test_a_trace_is_its_times():
    assert list(Arrivals("trace", at_s=(0.0, 0.5, 0.5, 2.0)).times()) == [0.0, 0.5, 0.5, 2.0]


def test_shards_make_up_the_whole():
    whole = Arrivals("poisson", rate=50, seed=7)
    parts = [list(islice(shard(whole.times(), index, 3), 100)) for index in range(3)]
    assert sorted(chain(*parts)) == first(whole, 300)


@pytest.mark.parametrize(
    ("arrivals", "named"),
    [
        (Arrivals("closed"), "closed"),
        (Arrivals("poisson"), "rate"),
        (Arrivals("constant", rate=0.0), "rate"),
        (Arrivals("gamma", rate=1.0, shape=-1.0), "shape"),
        (Arrivals("burst", rate=1.0, burst=0), "burst"),
        (Arrivals("ramp", rate=1.0), "rate_end"),
        (Arrivals("ramp", rate=1.0, rate_end=2.0), "ramp_s"),
        (Arrivals("trace", at_s=(1.0, 0.5)), "ascend"),
    ],
)
def test_what_is_no_arrival_is_refused(arrivals, named):
    with pytest.raises(ValueError, match=named):
        next(arrivals.times())
