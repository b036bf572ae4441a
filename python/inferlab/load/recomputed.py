"""Loads read from a file: their figures made anew from their records.

So what a report says of a load is what its raw rows say, whatever else stands in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from inferlab.load.levels import gauge, level_of
from inferlab.load.metrics import load_figures
from inferlab.load.outputs import LoadStats
from inferlab.output import differences
from inferlab.records import record_of


def recomputed_load(stats: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A load with the figures of its records, and in words where the file said others.

    Raises:
        ValueError: a record that is none, or is of no load.
    """
    records = [record_of({"record": entry}) for entry in stats["records"]]
    goodput = stats.get("goodput") or {}
    figures = load_figures(
        records, slos=goodput.get("slos_ms"), asked_per_s=stats["rates"]["asked_per_s"]
    )
    return {**stats, **figures}, _differences({k: stats[k] for k in figures}, figures)


def recomputed_sweep(stats: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A sweep with the figures of its records; see `recomputed_load`.

    Raises:
        ValueError: as there; or levels and loads that are not as many.
    """
    if len(stats["levels"]) != len(stats["loads"]):
        raise ValueError(f"has {len(stats['levels'])} levels of {len(stats['loads'])} loads")
    loads, levels, found = [], [], []
    best: float | None = None
    for number, (row, load) in enumerate(zip(stats["levels"], stats["loads"], strict=True)):
        load, of_load = recomputed_load(load)
        made = level_of(row["level"], cast(LoadStats, load), best)
        best = max(best or 0.0, gauge(made))
        loads.append(load)
        levels.append(made)
        found += [f"loads[{number}].{line}" for line in of_load]
        found += _differences(row, made, f"levels[{number}]")
    return {**stats, "levels": levels, "loads": loads}, found


def _differences(said: Any, made: Any, where: str = "") -> list[str]:
    return [
        f"{path} is {one!r} in the file, {other!r} by its records"
        for path, one, other in differences(said, made, where)
        if not _is_rounding(one, other)
    ]


def _is_rounding(one: Any, other: Any) -> bool:
    numbers = all(isinstance(value, int | float) for value in (one, other))
    return numbers and math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
