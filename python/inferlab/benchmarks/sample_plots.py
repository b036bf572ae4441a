"""Plots of raw rows, whoever decoded: times, acceptance by position, phases, load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from inferlab.benchmarks.samples import TIMES, Sample
from inferlab.records import total_stats
from inferlab.reports.model import Bars, Curves, Series
from inferlab.reports.svg import distribution

IN_RECORDS = {
    "ttft_ms": "first_token_ms",
    "tpot_ms": "text_times_ms, over num_tokens less one",
    "ms_per_token": "latency_ms, over num_tokens",
}
"""What figures of a run are made of in a record."""

MOST = 800
"""Points of a curve of requests in flight."""
FAR = 8.0
"""Times that span more than this are drawn by their logarithm."""


def sample_plots(
    modes: Mapping[str, Sequence[Sample]], rows: str, records: str, more: str = ""
) -> list[Curves]:
    """Distributions of all times, acceptance by position, requests in flight: those that can be
    told.

    Args:
        modes: mode -> its runs.
        rows, records: where they are in the JSON; the same where rows are made of records.
        more: what titles go on with.
    """
    keys = IN_RECORDS if rows == records else {}
    plots = [
        _times(modes, key, title, f"{rows}.{keys.get(key, key)}") for key, title in TIMES.items()
    ]
    plots += [_acceptance(modes, records), _in_flight(modes, records)]
    return [replace(plot, title=plot.title + more) for plot in plots if plot.series]


def phase_bars(
    phases: Mapping[str, Mapping[str, float]], source: str, more: str = ""
) -> list[Bars]:
    """Time by phase.

    Args:
        phases: mode -> phase -> ms per token.
        more: what the title goes on with.
    """
    if not phases:
        return []
    names = dict.fromkeys(name for of in phases.values() for name in of)
    parts = {name: [of.get(name, 0.0) for of in phases.values()] for name in names}
    return [Bars(f"Time by phase{more}", "ms per token", list(phases), parts, source)]


def batch_curves(rows: Sequence[Mapping[str, Any]]) -> list[Curves]:
    """Throughput against batch size, and latency against throughput; of more than one size.

    Args:
        rows: runs, each with ``mode`` and ``batch_size``; a point is medians over runs.
    """
    points: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for row in rows:
        if "error" not in row:
            points.setdefault(row["mode"], []).append((row["batch_size"], row))
    by_size, curve = [], []
    for mode, found in points.items():
        sizes = sorted({size for size, _ in found})
        if len(sizes) < 2:
            continue
        rates, times = [], []
        for size in sizes:
            of_size = [row for at, row in found if at == size]
            rates.append(median(row["tokens_per_second"] for row in of_size))
            times.append(median(row["latency_ms"] for row in of_size))
        by_size.append(Series(mode, list(zip(sizes, rates, strict=True))))
        curve.append(Series(mode, list(zip(rates, times, strict=True))))
    if not curve:
        return []
    source = "runs[], medians by batch_size and mode"
    return [
        Curves("Latency against throughput", "tokens per second", "latency, ms", curve, source),
        Curves("Throughput by batch size", "batch size", "tokens per second", by_size, source),
    ]


def _times(modes: Mapping[str, Sequence[Sample]], key: str, title: str, source: str) -> Curves:
    values = {
        mode: [sample.figures[key] for sample in samples if key in sample.figures]
        for mode, samples in modes.items()
    }
    values = {mode: of for mode, of in values.items() if of}
    every = [value for of in values.values() for value in of]
    return Curves(
        title,
        title,
        "share of runs",
        [distribution(mode, of) for mode, of in values.items()],
        source,
        steps=True,
        share=True,
        log_x=bool(every) and min(every) > 0 and max(every) > FAR * min(every),
    )


def _acceptance(modes: Mapping[str, Sequence[Sample]], records: str) -> Curves:
    series = []
    for mode, samples in modes.items():
        rates = total_stats(r for s in samples for r in s.records).acceptance_by_position
        if rates:
            series.append(Series(mode, [(float(i), rate) for i, rate in enumerate(rates, 1)]))
    source = f"{records}.speculation.stats, accepted_at over offered_at"
    return Curves("Acceptance by position", "position in the draft", "accepted", series, source,
                  share=True)  # fmt: skip


def _in_flight(modes: Mapping[str, Sequence[Sample]], records: str) -> Curves:
    """Requests under way; nothing where there never was more than one."""
    series = []
    begun = min((r.started_at for of in modes.values() for s in of for r in s.records), default=0.0)
    for mode, samples in modes.items():
        every = [r for s in samples for r in s.records if r.exchange is not None]
        changes = [(r.started_at - begun, 1) for r in every]
        changes += [(r.started_at - begun + r.latency_ms / 1e3, -1) for r in every]
        count, points = 0, [(0.0, 0.0)]
        for at, change in sorted(changes):
            count += change
            points.append((at, float(count)))
        if max(y for _, y in points) > 1:
            series.append(Series(mode, _highest(points)))
    source = f"{records}.started_at and .latency_ms"
    return Curves("Requests in flight", "seconds", "requests", series, source, steps=True)


def _highest(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of many points in a row the highest of each few: none of the peaks is lost."""
    few = -(-len(points) // MOST)
    chunks = (points[first : first + few] for first in range(0, len(points), few))
    return [max(chunk, key=lambda point: point[1]) for chunk in chunks]
