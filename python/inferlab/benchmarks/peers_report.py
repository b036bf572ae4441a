"""The report of `inferlab bench --peers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferlab.benchmarks.peers import PEERS
from inferlab.benchmarks.run_report import environment_facts, failure_lines, setting_facts
from inferlab.benchmarks.sample_plots import batch_curves, sample_plots
from inferlab.benchmarks.samples import modes_in, samples_of
from inferlab.reports.model import Bars, Heading, Lines, Part, Report, Table
from inferlab.reports.numbers import fixed, number, ratio

COLUMNS = (
    "engine", "tokens/s (95 %)", "ms per token", "first token, ms", "accepted length",
    "plain is x", "speculative is x", "same ids", "weights, MB", "peak RSS, MB", "J per token",
)  # fmt: skip
UNKNOWN = "not known"


def peers_report(stats: Mapping[str, Any]) -> Report:
    """Settings, versions, a table per batch size, whose ids differ, and who is left out."""
    trouble = [f"left out: {name}: {why}" for name, why in stats["left_out"].items()]
    trouble += failure_lines(stats)
    parts: list[Part] = [Lines(trouble, alarm=True)] if trouble else []
    for size, engines in stats["batches"].items():
        parts += [Heading(f"batch {size}"), _table(stats, size, engines)]
        said = [
            f"{stats['engines'][name]['title']}: {text}"
            for name, found in stats["token_ids"][size].items()
            for text in _differences(found)
        ]
        singly = [
            stats["engines"][name]["title"]
            for name in stats["engines"]
            if name in PEERS and not PEERS[name].batches and int(size) > 1
        ]
        if singly:
            said.append(f"{', '.join(singly)}: one text at a time, so not here")
        if said:
            parts.append(Lines(said))
    parts += [Heading("Plots"), *_bars(stats)]
    parts += batch_curves(stats["runs"])
    parts += sample_plots(modes_in(samples_of(stats)), "runs[]", "runs[]")
    settings = stats["settings"]
    facts = setting_facts(settings, [name for name in settings if name != "energy_sources"])
    facts.append(("energy", " and ".join(settings["energy_sources"]) or UNKNOWN))
    for engine in stats["engines"].values():
        versions = ", ".join(f"{key} {value}" for key, value in engine["versions"].items())
        facts.append((engine["title"], f"{versions}; {engine['format']}"))
    return Report("engines side by side", facts, parts, details=environment_facts(stats))


def _table(stats: Mapping[str, Any], size: str, engines: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, figures in engines.items():
        about = stats["engines"][name]
        rows.append(
            (
                about["title"],
                _rate(figures["tokens_per_second"]),
                _median(figures.get("ms_per_token"), 3),
                _median(figures.get("first_token_ms"), 1),
                fixed(figures["accepted_length"]),
                ratio(figures["plain_is_x"]),
                ratio(figures["speculative_is_x"]),
                _same(stats["token_ids"][size].get(name)),
                fixed(about["weights_mb"], 1) or UNKNOWN,
                fixed(about["peak_rss_mb"], 0) or UNKNOWN,
                number(figures["joules_per_token"]) or UNKNOWN,
            )
        )
    return Table(COLUMNS, rows, "runs[], medians; memory: engines")


def _bars(stats: Mapping[str, Any]) -> list[Bars]:
    """Speed at each batch size, and memory."""
    titles = {name: engine["title"] for name, engine in stats["engines"].items()}
    bars = []
    for size, engines in stats["batches"].items():
        speeds = {titles[name]: of["tokens_per_second"]["median"] for name, of in engines.items()}
        bars.append(_bar(f"Speed, batch {size}", "tokens per second", speeds, "runs[], medians"))
    memory = {
        engine["title"]: engine["peak_rss_mb"]
        for engine in stats["engines"].values()
        if engine["peak_rss_mb"] is not None
    }
    if memory:
        bars.append(_bar("Peak resident memory", "MB", memory, "engines.*.peak_rss_mb"))
    return bars


def _bar(title: str, unit: str, values: Mapping[str, float], source: str) -> Bars:
    return Bars(title, unit, list(values), {unit: list(values.values())}, source)


def _rate(summary: Mapping[str, Any]) -> str:
    interval = summary["median_ci95"]
    text = f"{summary['median']:.0f}"
    return text if interval is None else f"{text} ({interval[0]:.0f} to {interval[1]:.0f})"


def _median(summary: Mapping[str, Any] | None, digits: int) -> str:
    return UNKNOWN if summary is None else f"{summary['median']:.{digits}f}"


def _same(found: Mapping[str, Any] | None) -> str:
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


def _differences(found: Mapping[str, Any]) -> list[str]:
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
