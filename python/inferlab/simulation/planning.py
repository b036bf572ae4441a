"""Settings side by side, and how many replicas are enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from typing_extensions import TypedDict

from inferlab.simulation.load import Load
from inferlab.simulation.setting import Setting
from inferlab.simulation.summary import Summary


class Row(TypedDict):
    """A setting under a load, and what came of it."""

    replicas: int
    routing: str
    K: int | str
    max_batch: int
    read_tokens: int
    rate: float | None
    clients: int | None  # of a closed loop
    result: Summary


class Enough(TypedDict):
    """The fewest replicas with which enough requests are within the objectives; None: none of those
    that were tried."""

    routing: str
    K: int | str
    max_batch: int
    read_tokens: int
    rate: float | None
    clients: int | None
    replicas: int | None


POLICY = ("routing", "K", "max_batch", "read_tokens")
LOAD = ("rate", "clients")


def cases(load: Load, setting: Setting, **choices: Sequence[Any]) -> Iterator[tuple[Load, Setting]]:
    """Every combination.

    Args:
        choices: values of ``rate``, ``clients`` and of any attribute of `Setting`.
    """
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        asked = {key: chosen.pop(key) for key in LOAD if key in chosen}
        arrivals = replace(load.arrivals, **asked)
        yield replace(load, arrivals=arrivals), replace(setting, **chosen)


def row_of(load: Load, setting: Setting, result: Summary) -> Row:
    """For a table."""
    arrivals = load.arrivals
    return {
        "replicas": setting.replicas,
        "routing": setting.routing,
        "K": setting.levels,
        "max_batch": setting.max_batch,
        "read_tokens": setting.read_tokens,
        "rate": arrivals.rate,
        "clients": arrivals.clients if arrivals.rate is None else None,
        "result": result,
    }


def enough(rows: Sequence[Row], share: float) -> list[Enough]:
    """Of each load and each policy, with how many replicas ``share`` of the requests are within
    their objectives."""
    found: dict[tuple[Any, ...], int | None] = {}
    for row in sorted(rows, key=lambda row: row["replicas"]):
        values: Any = row
        key = tuple(values[name] for name in (*LOAD, *POLICY))
        if found.get(key) is None:
            found[key] = row["replicas"] if row["result"]["within"] >= share else None
    return [
        {
            "routing": routing,
            "K": levels,
            "max_batch": max_batch,
            "read_tokens": read_tokens,
            "rate": rate,
            "clients": clients,
            "replicas": replicas,
        }
        for (rate, clients, routing, levels, max_batch, read_tokens), replicas in found.items()
    ]
