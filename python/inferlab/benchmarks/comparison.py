"""Speculative against plain decoding against Hugging Face: figures by mode, and speedups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from inferlab.benchmarks.measure import FIGURES, Measurements, Run
from inferlab.benchmarks.statistics import ratio_of_medians, summarize
from inferlab.records import record_of, total_stats
from inferlab.types import SpeculationStats

MODE_TITLES = {
    "specdec": "speculative",
    "plain": "plain, same engine",
    "hf": "Hugging Face generate",
}


def figures_of(measurements: Measurements, mode: str) -> dict[str, Any]:
    """Figure (``latency_ms``, ``tokens_per_second``, ...) -> summary over a mode's good runs."""
    rows = [run.row() for run in measurements.of(mode)]
    figures = {}
    for key in ("latency_ms", "tokens_per_second", "ms_per_token", "num_tokens", *FIGURES):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            figures[key] = summarize(values)
    return figures


def phases_of(measurements: Measurements, mode: str) -> dict[str, float]:
    """Mean time by phase, in ms per generated token; empty where a mode tells no phases."""
    results = [run.result for run in measurements.of(mode) if run.result is not None]
    results = [result for result in results if "timings_ms" in result]
    tokens = sum(result["num_tokens"] for result in results)
    phases = dict.fromkeys(phase for result in results for phase in result["timings_ms"])
    if not tokens:
        return {}
    return {
        phase: sum(result["timings_ms"].get(phase, 0.0) for result in results) / tokens
        for phase in phases
    }


def speculation_of(measurements: Measurements, mode: str) -> SpeculationStats | None:
    """Counts over a mode's good requests; None where it tells of no steps."""
    runs = measurements.of(mode)
    stats = total_stats(record_of({"record": one}) for run in runs for one in run.records)
    return stats if stats.steps else None


def batch_rows(
    measurements: Measurements, groups: Sequence[Sequence[int]], size: int
) -> list[dict[str, Any]]:
    """The raw row of each run of a batch, for JSON: figures, phases and records of its requests.

    Args:
        groups: the indices of the prompts of each batch.
        size: prompts that were to be decoded together.
    """
    return [batch_row(run, groups, size) for run in measurements.runs]


def batch_row(run: Run, groups: Sequence[Sequence[int]], size: int) -> dict[str, Any]:
    """One of :func:`batch_rows`."""
    row = {"batch_size": size, **run.row(), "prompt_indices": list(groups[run.prompt_index])}
    del row["prompt_index"]  # that of the batch, which nobody knows
    row["timings_ms"] = (run.result or {}).get("timings_ms", {})
    return {**row, "records": run.records}


def by_prompt(measurements: Measurements, mode: str, num_prompts: int) -> list[dict[str, Any]]:
    """Medians over the iterations of each prompt that has any."""
    entries = []
    for index in range(num_prompts):
        rows = [run.row() for run in measurements.of(mode, index)]
        if rows:
            entry: dict[str, Any] = {"prompt_index": index, "iterations": len(rows)}
            for key in ("latency_ms", "tokens_per_second", "ms_per_token"):
                if values := [row[key] for row in rows if key in row]:
                    entry[key] = summarize(values)["median"]
            entries.append(entry)
    return entries


def speedup(
    measurements: Measurements, mode: str, baseline: str, num_prompts: int
) -> dict[str, Any] | None:
    """Tokens per second of ``mode`` over those of ``baseline``, run beside run.

    Returns:
        :func:`~inferlab.benchmarks.statistics.ratio_of_medians` over prompts; None where no prompt
        has an iteration in which both made tokens.
    """
    above: list[list[float]] = []
    below: list[list[float]] = []
    for index in range(num_prompts):
        rates = {}
        for name in (mode, baseline):
            rows = [run.row() for run in measurements.of(name, index)]
            rates[name] = {
                row["iteration"]: row["tokens_per_second"] for row in rows if row["num_tokens"]
            }
        shared = sorted(rates[mode].keys() & rates[baseline].keys())
        if shared:
            above.append([rates[mode][iteration] for iteration in shared])
            below.append([rates[baseline][iteration] for iteration in shared])
    return ratio_of_medians(above, below) if above else None


def compare_modes(
    measurements: Measurements, modes: Sequence[str], num_prompts: int
) -> dict[str, Any]:
    """The comparison of ``modes``, the first of which is what was asked for.

    Returns:
        ``modes``: mode -> figures; ``records``: of the requests of all modes but the first, with
        ``mode``, ``prompt_index`` and ``iteration``; ``speedup_vs_plain`` and ``speedup_vs_hf``: of
        the first mode, with interval and by prompt; ``latency_ms`` and ``tokens_per_second``: of
        the baseline, that is of Hugging Face where it ran, else of plain decoding.
    """
    figures = {mode: figures_of(measurements, mode) for mode in modes}
    for mode in modes:
        if phases := phases_of(measurements, mode):
            figures[mode]["phases_ms_per_token"] = phases
    comparison: dict[str, Any] = {"modes": figures}
    comparison["records"] = [
        {"mode": run.mode, "prompt_index": run.prompt_index, "iteration": run.iteration,
         "record": record}
        for run in measurements.runs
        if run.mode != modes[0] and run.error is None
        for record in run.records
    ]  # fmt: skip
    for baseline in modes[1:]:
        comparison[f"speedup_vs_{baseline}"] = speedup(
            measurements, modes[0], baseline, num_prompts
        )
        comparison["baseline"] = baseline
        comparison["latency_ms"] = figures[baseline].get("latency_ms")
        comparison["tokens_per_second"] = figures[baseline].get("tokens_per_second")
    return comparison


def first_difference(
    one: Sequence[int], other: Sequence[int]
) -> tuple[int, tuple[int | None, int | None]] | None:
    """The first place where two texts differ, and both tokens there (None: it has ended); None
    where they are equal."""
    pairs = enumerate(zip_longest(one, other))
    return next(((at, pair) for at, pair in pairs if pair[0] != pair[1]), None)
