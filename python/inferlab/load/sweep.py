"""Loads that grow until the server gives no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from inferlab.load.levels import gauge, level_of
from inferlab.load.measure import Measured, measure_load
from inferlab.load.outputs import LoadStats, SweepLevel, SweepStats
from inferlab.load.plan import LoadPlan
from inferlab.records import RequestRecord

MAX_LEVELS = 16


def sweep(
    plan: LoadPlan,
    how: Measured,
    *,
    stop_below_gain: float = 0.05,
    keep: Callable[[RequestRecord], None] | None = None,
    on_level: Callable[[SweepLevel], None] | None = None,
) -> SweepStats:
    """Runs a load again and again, each time with twice the concurrency (of a closed load) or rate
    (of an open one), until one gives not ``stop_below_gain`` more tokens per second than the best
    before it, spends its error budget, or is interrupted.

    A level of a closed load begins at least as many conversations as it has users.

    Args:
        on_level: called with each level as soon as it has ended.
    """
    closed = plan.arrivals.kind == "closed"
    level = float(plan.concurrency or 1) if closed else plan.arrivals.rate
    if level is None:
        raise ValueError("a sweep needs a concurrency or a rate to begin with")
    best = 0.0
    stopped: Literal["saturated", "failures", "interrupted", "levels"] = "levels"
    levels: list[SweepLevel] = []
    loads: list[LoadStats] = []
    for _ in range(MAX_LEVELS):
        stats = measure_load(at_level(plan, level), how, keep)
        row = level_of(level, stats, best if levels else None)
        levels.append(row)
        loads.append(stats)
        if on_level is not None:
            on_level(row)
        if stats["interrupted"]:
            stopped = "interrupted"
            break
        if not stats["within_budget"]:
            stopped = "failures"
            break
        if row["gain"] is not None and row["gain"] < stop_below_gain:
            stopped = "saturated"
            break
        best = max(best, gauge(row))
        level *= 2
    return {
        "mode": "http",
        "of": "concurrency" if closed else "rate",
        "stop_below_gain": stop_below_gain,
        "stopped": stopped,
        "interrupted": stopped == "interrupted",
        "levels": levels,
        "loads": loads,
    }


def at_level(plan: LoadPlan, level: float) -> LoadPlan:
    """The load with that concurrency or rate."""
    if plan.arrivals.kind != "closed":
        return replace(plan, arrivals=replace(plan.arrivals, rate=level))
    users = int(level)
    count = None if plan.count is None else max(plan.count, users)
    return replace(plan, concurrency=users, count=count)
