"""Sweeps: which loads follow each other, and when they end; every load is told, not run."""

from __future__ import annotations

import pytest

from helpers.loads import plan_of
from inferlab.load import sweep as sweeps
from inferlab.load.arrivals import Arrivals
from inferlab.load.measure import Measured

OPEN = Arrivals("poisson", rate=3.0)


def told(tokens_per_s: float | None, *, requests_per_s: float = 1.0, **more):
    """What a load came to."""
    throughput = {"requests_per_s": requests_per_s, "output_tokens_per_s": tokens_per_s}
    usual = {
        "throughput": throughput, "goodput": None, "distributions": {"ttft_ms": None},
        "requests": {"failed": 0}, "within_budget": True, "interrupted": False,
    }  # fmt: skip
    return {**usual, **more}


def run(monkeypatch, plan, loads, **more):
    """The sweep over a server that gives these, one after the other; the plans that it ran."""
    plans = []
    given = iter(loads)

    def measure(plan, how, keep):
        plans.append(plan)
        return next(given)

    monkeypatch.setattr(sweeps, "measure_load", measure)
    return sweeps.sweep(plan, Measured(), **more), plans


def test_users_double_until_little_more_comes(monkeypatch):
    seen = []
    stats, plans = run(
        monkeypatch, plan_of("http://h", "a", "b", concurrency=3),
        [told(100.0), told(180.0), told(185.0)], on_level=seen.append,
    )  # fmt: skip
    assert [plan.concurrency for plan in plans] == [3, 6, 12]
    assert [plan.count for plan in plans] == [3, 6, 12], "a conversation for each user"
    assert [row["gain"] for row in stats["levels"]] == [
        None, pytest.approx(0.8), pytest.approx(5 / 180),
    ]  # fmt: skip
    assert (stats["of"], stats["stopped"]) == ("concurrency", "saturated")
    assert seen == stats["levels"]


def test_rates_double_and_what_comes_is_compared_with_the_best(monkeypatch):
    stats, plans = run(
        monkeypatch, plan_of("http://h", arrivals=OPEN, concurrency=None, count=9),
        [told(None, requests_per_s=5), told(None, requests_per_s=9), told(None, requests_per_s=8)],
    )  # fmt: skip
    assert [plan.arrivals.rate for plan in plans] == [3.0, 6.0, 12.0]
    assert {plan.count for plan in plans} == {9}
    assert stats["levels"][2]["gain"] == pytest.approx(8 / 9 - 1)
    assert (stats["of"], stats["stopped"]) == ("rate", "saturated")


@pytest.mark.parametrize(
    ("last", "stopped"),
    [({"within_budget": False}, "failures"), ({"interrupted": True}, "interrupted")],
)
def test_failures_and_ctrl_c_end_it(monkeypatch, last, stopped):
    stats, _ = run(monkeypatch, plan_of("http://h"), [told(1.0), told(9.0, **last)])
    assert (stats["stopped"], len(stats["loads"])) == (stopped, 2)
    assert stats["interrupted"] is (stopped == "interrupted")


def test_it_ends_after_so_many_levels(monkeypatch):
    stats, _ = run(monkeypatch, plan_of("http://h"), [told(2.0**n) for n in range(99)])
    assert (stats["stopped"], len(stats["levels"])) == ("levels", sweeps.MAX_LEVELS)
