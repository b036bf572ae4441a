"""The report of `inferlab bench --quantization-matrix`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferlab.benchmarks.names import FORWARD_ROWS
from inferlab.benchmarks.run_report import environment_facts, failure_lines, setting_facts
from inferlab.benchmarks.sample_plots import sample_plots
from inferlab.benchmarks.samples import modes_in, samples_of
from inferlab.reports.model import Bars, Curves, Lines, Part, Report, Series, Table
from inferlab.reports.numbers import fixed, ratio


def matrix_report(stats: Mapping[str, Any]) -> Report:
    """Settings, both tables, and the plots of what they say."""
    trouble = failure_lines(stats)
    parts: list[Part] = [Lines(trouble, alarm=True)] if trouble else []
    parts += [_targets(stats), _pairs(stats), *matrix_plots(stats)]
    parts += sample_plots(modes_in(samples_of(stats)), "runs[]", "runs[].records[]")
    facts = setting_facts(stats["settings"], list(stats["settings"]))
    return Report("weights by format", facts, parts, details=environment_facts(stats))


def matrix_plots(stats: Mapping[str, Any]) -> list[Curves | Bars]:
    """Forward time by rows, and tokens per second of every pair."""
    forwards = [
        Series(name, [(float(rows), ms) for rows, ms in of["forward_ms"].items()])
        for name, of in stats["targets"].items()
    ]
    speeds = {f"{name}, plain": of["tokens_per_second"] for name, of in stats["targets"].items()}
    for pair in stats["pairs"]:
        label = pair["target"] if pair["draft_mb"] is None else f"{pair['target']}, {pair['draft']}"
        speeds[label] = pair["tokens_per_second"]
    return [
        Curves("Forward time", "rows", "forward, ms", forwards, "targets.*.forward_ms", log_x=True),
        Bars("Speed (target, draft)", "tokens per second", list(speeds),
             {"tokens per second": list(speeds.values())}, "runs[].tokens_per_second, medians"),
    ]  # fmt: skip


def _targets(stats: Mapping[str, Any]) -> Table:
    rows = []
    for name, of in stats["targets"].items():
        after = of["first_difference"]
        rows.append(
            (
                name,
                f"{of['weights_mb']:.1f}",
                f"{of['kv_bytes_per_token']}",
                *(fixed(of["forward_ms"].get(str(n))) for n in FORWARD_ROWS),
                fixed(of["perplexity"]),
                f"{of['tokens_per_second']:.0f}",
                ratio(of["x_unquantized"]),
                f"{of['same_tokens']} of {of['compared']}",
                fixed(after, 0),
            )
        )
    forwards = [f"{rows} rows, ms" for rows in FORWARD_ROWS]
    columns = ("target", "weights, MB", "K/V, bytes a token", *forwards, "perplexity", "tokens/s",
               "x unquantized", "same tokens", "differs after")  # fmt: skip
    return Table(columns, rows, "targets; speed and tokens from runs[]")


def _pairs(stats: Mapping[str, Any]) -> Table:
    rows = [
        (
            pair["target"],
            pair["draft"] if pair["draft_mb"] is not None else "",
            fixed(pair["draft_mb"], 1),
            fixed(pair["accepted_length"]),
            f"{pair['tokens_per_second']:.0f}",
            ratio(pair["x_plain"]),
            ratio(pair["x_unquantized"]),
        )
        for pair in stats["pairs"]
    ]
    columns = ("target", "draft", "draft, MB", "accepted length", "tokens/s", "x plain",
               "x unquantized")  # fmt: skip
    return Table(columns, rows, "runs[], medians; acceptance over runs[].records[]")
