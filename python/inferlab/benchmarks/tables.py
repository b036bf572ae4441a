"""What a benchmark found: tables for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inferlab.benchmarks.comparison import MODE_TITLES
from inferlab.output import write_json, write_text

CSV_COLUMNS = (
    "mode", "prompt_index", "iteration", "order", "latency_ms", "num_tokens", "tokens_per_second",
    "ms_per_token", "acceptance_rate", "mean_accepted_length", "target_forwards", "first_token_ms",
    "ttft_ms", "tpot_ms", "perplexity", "error",
)  # fmt: skip
FIGURE_TITLES = {
    "latency_ms": "latency, ms",
    "ms_per_token": "ms per token",
    "tokens_per_second": "tokens per second",
    "first_token_ms": "first token, ms",
    "ttft_ms": "TTFT, ms",
    "tpot_ms": "TPOT, ms",
    "acceptance_rate": "acceptance rate",
    "mean_accepted_length": "accepted length",
    "target_forwards": "target forwards",
    "num_tokens": "new tokens",
}
LINES = (
    "base_model", "draft_model", "draft_mode", "max_draft", "tree", "policy", "controller",
    "model", "server", "endpoint", "implementation", "device", "dtype", "max_new_tokens",
    "temperature", "seed",
)  # fmt: skip


def output_paths(prefix: str | Path) -> tuple[Path, Path]:
    """``PREFIX.json`` and ``PREFIX.csv``; either ending may stand at the prefix already."""
    stem = Path(prefix)
    if stem.suffix in (".json", ".csv"):
        stem = stem.with_suffix("")
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".csv")


def write_outputs(
    prefix: str | Path, stats: Mapping[str, Any], columns: Sequence[str] = CSV_COLUMNS
) -> list[Path]:
    """Writes ``PREFIX.json`` (all of it) and ``PREFIX.csv`` (a row per run); returns both paths.

    Raises:
        UsageError: a file cannot be written.
    """
    as_json, as_csv = output_paths(prefix)
    write_json(as_json, stats)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(stats.get("runs", ()))
    write_text(as_csv, table.getvalue())
    return [as_json, as_csv]


def print_summary(stats: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what :meth:`BenchmarkRunner.run_benchmark` returned, as tables."""
    console = console or _console()
    console.print(f"{stats['mode']} benchmark ({stats['runner_name']})", style="bold")
    for key in LINES:
        if stats.get(key) is not None:
            _line(console, key.replace("_", " "), _short(stats[key]))
    if stats["num_prompts"] == 1:
        _line(console, "prompt", repr(stats["prompt"]))
    else:
        _line(console, "prompts", str(stats["num_prompts"]))
    _line(console, "iterations", f"{stats['iterations']} (warm-up: {stats['warmup_iterations']})")
    if stats["interrupted"]:
        console.print("interrupted: these are partial results", style="bold")
    for failure in stats["failures"]:
        where = f"{failure['mode']}, prompt {failure['prompt_index']}"
        where += f" ({failure['where']})" if "where" in failure else ""
        _line(console, "failed", f"{where}, iteration {failure['iteration']}: {failure['error']}")
    if "error" in stats:
        _line(console, "error", stats["error"])
        return
    console.print(_figures_table(stats))
    if "phases_ms_per_token" in stats:
        phases = stats["phases_ms_per_token"].items()
        _line(console, "ms per token", ", ".join(f"{name} {ms:.3f}" for name, ms in phases))
    if "perplexity" in stats:
        found = stats["perplexity"]
        _line(
            console,
            "perplexity",
            f"{found['perplexity']:.3f} over {found['tokens']} tokens, under {found['model']}",
        )
    if "baseline_comparison" in stats:
        console.print(comparison_table(stats["baseline_comparison"]))
        for text in id_lines(stats["baseline_comparison"]["token_ids"]):
            console.print(text, markup=False)


def _console() -> Console:
    """Stdout, wide enough for the tables where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def _figures_table(stats: Mapping[str, Any]) -> Table:
    columns = ("mean", "median", "std", "min", "max", "p90", "p99")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    for name in (*columns, "95 % of median"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, title in FIGURE_TITLES.items():
        if key in stats:
            summary = stats[key]
            cells = [_number(summary[name]) for name in columns]
            table.add_row(title, *cells, _interval(summary["median_ci95"]))
    return table


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Mode, tok/s, ms/token, accepted length, target forwards, speedups of each mode.

    Figures are medians over runs; speedups are ratios of medians over prompts, with the interval.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("mode", no_wrap=True)
    for name in ("tok/s", "ms/token", "accepted length", "target forwards"):
        table.add_column(name, justify="right")
    baselines = [mode for mode in ("plain", "hf") if f"speedup_vs_{mode}" in comparison]
    for mode in baselines:
        table.add_column(
            f"x {'plain' if mode == 'plain' else 'HF generate'}", justify="right", no_wrap=True
        )
    for index, (mode, figures) in enumerate(comparison["modes"].items()):
        cells = [
            _number(figures[key]["median"]) if key in figures else "-"
            for key in (
                "tokens_per_second",
                "ms_per_token",
                "mean_accepted_length",
                "target_forwards",
            )
        ]
        for baseline in baselines:
            found = comparison[f"speedup_vs_{baseline}"] if index == 0 else None
            if found is not None:
                cells.append(f"{found['ratio']:.2f} ({_interval(found['ci95'])})")
            else:
                cells.append("1" if mode == baseline else "")
        table.add_row(MODE_TITLES[mode], *cells)
    return table


def id_lines(token_ids: Mapping[str, Any]) -> list[str]:
    """What the comparison of token ids found, in sentences."""
    modes = ", ".join(token_ids["compared"])
    lines = []
    if token_ids["verdict"] == "identical":
        lines.append(f"token ids: identical for {token_ids['prompts']} prompts ({modes})")
    elif token_ids["verdict"] == "ties":
        lines.append(f"token ids ({modes}): differ by ties within rounding only")
    elif token_ids["verdict"] == "different":
        lines.append(f"token ids ({modes}): DIFFERENT, and not by ties within rounding")
    for entry in token_ids["differences"]:
        name = entry.get("where", f"prompt {entry['prompt_index']}")
        text = (
            f"  {name}, {' and '.join(entry['modes'])}: first at new token "
            f"{entry['position']}, {entry['token_ids'][0]} against {entry['token_ids'][1]}"
        )
        if "gap" in entry:
            text += f"; gap {entry['gap']:.3g}, rounding step {entry['rounding_step']:.3g}"
        lines.append(text + (" (a tie)" if entry["tie"] else ""))
    lines += [f"not compared: {mode}: {why}" for mode, why in token_ids["not_compared"].items()]
    return lines


def _line(console: Console, name: str, text: str) -> None:
    console.print(f"{name}: {text}", markup=False, soft_wrap=True)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(item) if key in ("policy", "controller") else f"{key}={item}"
                        for key, item in value.items())  # fmt: skip
    return str(value)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _interval(interval: Sequence[float] | None) -> str:
    if interval is None:
        return "-"
    low, high = (f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}" for value in interval)
    return f"{low} to {high}"
