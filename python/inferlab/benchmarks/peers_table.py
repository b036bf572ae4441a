"""The table, the rows and the figure of `inferlab bench --peers`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from inferlab.benchmarks.modes_table import markdown_table, number_text, ratio_text
from inferlab.benchmarks.outputs import PeersStats, Summary, TokenIds
from inferlab.benchmarks.peers import OURS
from inferlab.plots import new_figure

COLUMNS = (
    "engine", "tokens/s (95 %)", "ms per token", "first token, ms", "accepted length",
    "plain is x", "speculative is x", "same ids", "weights, MB", "peak RSS, MB", "J per token",
)  # fmt: skip
CSV_COLUMNS = (
    "mode", "batch_size", "prompt_indices", "iteration", "order", "latency_ms", "num_tokens",
    "tokens_per_second", "ms_per_token", "first_token_ms", "energy_j", "error",
)  # fmt: skip
UNKNOWN = "not known"


def print_peers(stats: PeersStats, console: Console | None = None) -> None:
    """Prints settings, versions, a table per batch size in Markdown, and what came in between."""
    console = console or Console(highlight=False, width=240)

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    settings: Mapping[str, Any] = stats["settings"]
    shown = [f"{key} {value}" for key, value in settings.items() if key != "energy_sources"]
    line(", ".join(shown))
    sources = settings["energy_sources"]
    line(f"energy: {' and '.join(sources) if sources else UNKNOWN}")
    for engine in stats["engines"].values():
        versions = ", ".join(f"{key} {value}" for key, value in engine["versions"].items())
        line(f"{engine['title']}: {versions}; {engine['format']}")
    for size, engines in stats["batches"].items():
        line(f"\nbatch {size}")
        table = markdown_table(*COLUMNS)
        for name, figures in engines.items():
            about = stats["engines"][name]
            joules = figures["joules_per_token"]
            table.add_row(
                about["title"],
                _rate(figures["tokens_per_second"]),
                _median(figures.get("ms_per_token"), 3),
                _median(figures.get("first_token_ms"), 1),
                number_text(figures["accepted_length"]),
                ratio_text(figures["plain_is_x"]),
                ratio_text(figures["speculative_is_x"]),
                _same(stats["token_ids"][size].get(name)),
                number_text(about["weights_mb"], 1) or UNKNOWN,
                number_text(about["peak_rss_mb"], 0) or UNKNOWN,
                f"{joules:.3g}" if joules is not None else UNKNOWN,
            )
        console.print(table)
        for name, found in stats["token_ids"][size].items():
            for text in _differences(found):
                line(f"{stats['engines'][name]['title']}: {text}")
    for name, why in stats["left_out"].items():
        line(f"left out: {name}: {why}")
    for failure in stats["failures"]:
        where = failure.get("where", f"prompt {failure['prompt_index']}")
        line(f"failed: {failure['mode']}, {where}: {failure['error']}")
    if stats["interrupted"]:
        line("interrupted: these are partial results")


def draw_peers(stats: PeersStats, path: Path) -> None:
    """Draws tokens per second by batch size, with their intervals, and peak memory, into an image
    file.

    Raises:
        ValueError: matplotlib is missing.
    """
    count = len(stats["engines"])
    figure = new_figure(11, 1.5 + 0.3 * count * max(1, len(stats["batches"])))
    speeds, memory = figure.subplots(1, 2, width_ratios=[2, 1])
    height = 0.8 / max(1, len(stats["batches"]))
    titles = {name: engine["title"] for name, engine in stats["engines"].items()}
    places = {name: float(place) for place, name in enumerate(titles)}
    for number, (size, engines) in enumerate(stats["batches"].items()):
        rates = {name: figures["tokens_per_second"] for name, figures in engines.items()}
        medians = [rate["median"] for rate in rates.values()]
        ends = [rate["median_ci95"] or (rate["median"],) * 2 for rate in rates.values()]
        below = [middle - low for middle, (low, _) in zip(medians, ends, strict=True)]
        above = [high - middle for middle, (_, high) in zip(medians, ends, strict=True)]
        at = [places[name] + (number + 0.5) * height - 0.4 for name in rates]
        speeds.barh(at, medians, height, xerr=[below, above], label=f"batch {size}", capsize=2)
    speeds.set_yticks(list(places.values()), list(titles.values()))
    speeds.set_xlabel("tokens per second, median and 95 %")
    speeds.legend()
    known = {
        name: engine["peak_rss_mb"]
        for name, engine in stats["engines"].items()
        if engine["peak_rss_mb"] is not None
    }
    memory.barh(
        [places[name] for name in known],
        list(known.values()),
        color=["tab:orange" if name in OURS else "tab:gray" for name in known],
    )
    memory.set_yticks([])
    memory.set_xlabel("peak resident memory, MB")
    for axes in (speeds, memory):
        axes.set_ylim(count - 0.5, -0.5)
    figure.savefig(path)


def _rate(summary: Summary) -> str:
    interval = summary["median_ci95"]
    text = f"{summary['median']:.0f}"
    return text if interval is None else f"{text} ({interval[0]:.0f} to {interval[1]:.0f})"


def _median(summary: Summary | None, digits: int) -> str:
    return UNKNOWN if summary is None else f"{summary['median']:.{digits}f}"


def _same(found: TokenIds | None) -> str:
    """Of how many prompts the ids are plain decoding's, and what of the others is a tie."""
    if found is None or not found["prompts"]:
        return ""
    different = found["differences"]
    ties = sum(entry["tie"] is True for entry in different)
    text = f"{found['prompts'] - len(different)} of {found['prompts']}"
    if ties:
        text += f", {ties} by ties"
    if len(different) > ties:
        text += f", {len(different) - ties} DIFFER"
    return text


def _differences(found: TokenIds) -> list[str]:
    lines = [f"ids not compared: {why}" for why in found["not_compared"].values()]
    for entry in found["differences"]:
        if entry["tie"]:
            continue
        name = entry.get("where", f"prompt {entry['prompt_index']}")
        tokens = entry["token_ids"]
        text = f"{name}: new token {entry['position']} is {tokens[1]}, plain's is {tokens[0]}"
        if "gap" in entry:
            text += f"; gap {entry['gap']:.3g}, rounding step {entry['rounding_step']:.3g}"
        lines.append(text)
    return lines
