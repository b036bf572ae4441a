"""The tables and the figure of `inferlab bench --quantization-matrix`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from inferlab.benchmarks.modes_table import markdown_table, number_text, ratio_text
from inferlab.benchmarks.outputs import MatrixStats
from inferlab.benchmarks.quantization import ROWS
from inferlab.plots import new_figure


def print_matrix(stats: MatrixStats, console: Console | None = None) -> None:
    """Prints settings and both tables, in Markdown."""
    console = console or Console(highlight=False, width=160)
    console.print(", ".join(f"{k} {v}" for k, v in stats["settings"].items()), markup=False)
    forwards = [f"{rows} rows, ms" for rows in ROWS]
    targets = markdown_table(
        "target",
        "weights, MB",
        *forwards,
        "perplexity",
        "tokens/s",
        "x unquantized",
        "same tokens",
        "differs after",
    )
    for name, of in stats["targets"].items():
        after = of["first_difference"]
        targets.add_row(
            name,
            f"{of['weights_mb']:.1f}",
            *(number_text(of["forward_ms"].get(str(n))) for n in ROWS),
            number_text(of["perplexity"]),
            f"{of['tokens_per_second']:.0f}",
            ratio_text(of["x_unquantized"]),
            f"{of['same_tokens']} of {of['compared']}",
            "" if after is None else f"{after:.0f}",
        )
    pairs = markdown_table(
        "target", "draft", "draft, MB", "accepted length", "tokens/s", "x plain", "x unquantized"
    )
    for pair in stats["pairs"]:
        length, size = pair["accepted_length"], pair["draft_mb"]
        pairs.add_row(
            pair["target"],
            pair["draft"] if size is not None else "",
            number_text(size, 1),
            number_text(length),
            f"{pair['tokens_per_second']:.0f}",
            ratio_text(pair["x_plain"]),
            ratio_text(pair["x_unquantized"]),
        )
    for table in (targets, pairs):
        console.print()
        console.print(table)
    for failure in stats["failures"]:
        text = f"failed: {failure['mode']}, prompt {failure['prompt_index']}: {failure['error']}"
        console.print(text, markup=False)
    if stats["interrupted"]:
        console.print("interrupted: these are partial results", markup=False)


def draw_matrix(stats: MatrixStats, path: Path) -> None:
    """Draws forward time by rows, and tokens per second of every pair, into an image file.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = new_figure(9, 4)
    times, speeds = figure.subplots(1, 2)
    for name, of in stats["targets"].items():
        rows = [int(n) for n in of["forward_ms"]]
        times.plot(rows, list(of["forward_ms"].values()), marker="o", label=name)
    times.set_xscale("log", base=2)
    times.set_xticks(ROWS, [str(n) for n in ROWS])
    times.set_ylim(0)
    times.set_xlabel("rows")
    times.set_ylabel("forward, ms")
    times.legend(title="target")
    bars = {f"{name}, plain": of["tokens_per_second"] for name, of in stats["targets"].items()}
    for pair in stats["pairs"]:
        label = pair["target"] if pair["draft_mb"] is None else f"{pair['target']}, {pair['draft']}"
        bars[label] = pair["tokens_per_second"]
    speeds.barh(list(bars), list(bars.values()))
    speeds.invert_yaxis()
    speeds.set_xlabel("tokens per second (target, draft)")
    figure.savefig(path)
