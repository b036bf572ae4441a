"""Loads read from a file: their figures made anew from their records.

So what a report says of a load is what its raw rows say, whatever else stands in the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

from inferlab.load.metrics import load_figures
from inferlab.load.outputs import LoadStats
from inferlab.load.sweep import level_of
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
    return {**stats, **figures}, list(_differences({k: stats[k] for k in figures}, figures, ""))


def recomputed_sweep(stats: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A sweep with the figures of its records; see `recomputed_load`.

    Raises:
        ValueError: as there; or levels and loads that are not as many.
    """
    if len(stats["levels"]) != len(stats["loads"]):
        raise ValueError(f"has {len(stats['levels'])} levels of {len(stats['loads'])} loads")
    loads, levels, differences = [], [], []
    best: float | None = None
    for number, (row, load) in enumerate(zip(stats["levels"], stats["loads"], strict=True)):
        load, found = recomputed_load(load)
        made = level_of(row["level"], cast(LoadStats, load), best)
        gauge = made["output_tokens_per_s"] or made["requests_per_s"]
        best = max(best or 0.0, gauge)
        loads.append(load)
        levels.append(made)
        differences += [f"loads[{number}].{line}" for line in found]
        differences += list(_differences(row, made, f"levels[{number}]"))
    return {**stats, "levels": levels, "loads": loads}, differences


def _differences(said: Any, made: Any, where: str) -> Iterator[str]:
    if isinstance(said, Mapping) and isinstance(made, Mapping):
        for key in {**said, **made}:
            yield from _differences(said.get(key), made.get(key), f"{where}.{key}".strip("."))
        return
    if isinstance(said, list | tuple) and isinstance(made, list | tuple) and len(said) == len(made):
        for place, (one, other) in enumerate(zip(said, made, strict=True)):
            yield from _differences(one, other, f"{where}[{place}]")
        return
    numbers = all(isinstance(value, int | float) for value in (said, made))
    if said != made and not (numbers and math.isclose(said, made, rel_tol=1e-9, abs_tol=1e-9)):
        yield f"{where} is {said!r} in the file, {made!r} by its records"
