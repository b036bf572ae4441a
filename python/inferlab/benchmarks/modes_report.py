"""The report of `inferlab bench --modes`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferlab.benchmarks.names import GENERATE, PLAIN
from inferlab.benchmarks.run_report import environment_facts, failure_lines, id_lines, setting_facts
from inferlab.benchmarks.sample_plots import batch_curves, phase_bars, sample_plots
from inferlab.benchmarks.samples import modes_in, samples_of
from inferlab.reports.model import Heading, Lines, Part, Report, Table
from inferlab.reports.numbers import fixed, ratio

TITLES = {
    PLAIN: "plain",
    GENERATE: "HF generate",
    "hf-assistant": "HF assistant_model",
    "hf-lookup": "HF prompt_lookup",
}
SETTINGS = (
    "base_model", "device", "dtype", "prompts", "max_new_tokens", "temperature", "seed", "policy",
    "controller", "iterations",
)  # fmt: skip
POSITIONS = 4  # of the acceptance by position that the table shows
COLUMNS = (
    "mode", "accepted length", "accepted by position", "forwards", "draft / verify / rest, ms",
    "tokens/s", "x plain", "x HF",
)  # fmt: skip


def modes_report(stats: Mapping[str, Any]) -> Report:
    """Settings, a table per batch size, and what comparing the tokens found.

    Args:
        stats: of `ModesResult.as_dict`, or what that is in JSON.
    """
    trouble = failure_lines(stats)
    parts: list[Part] = [Lines(trouble, alarm=True)] if trouble else []
    found = dict(zip(stats["batches"], stats["token_ids"].values(), strict=True))
    for size, modes in stats["batches"].items():
        parts += [Heading(f"batch {size}"), _table(modes), Lines(id_lines(found[size]))]
    parts.append(Heading("Plots"))
    samples = modes_in(samples_of(stats))
    parts += batch_curves(stats["runs"])
    several = len(stats["batches"]) > 1
    for size, modes in stats["batches"].items():
        more = f", batch {size}"
        names = {f"batch {size}, {mode}" if several else mode: mode for mode in modes}
        own = {names[name]: runs for name, runs in samples.items() if name in names}
        parts += sample_plots(own, "runs[]", "runs[].records[]", more)
        phases = {
            TITLES.get(mode, mode): of["phases_ms_per_token"]
            for mode, of in modes.items()
            if of.get("phases_ms_per_token")
        }
        parts += phase_bars(phases, "runs[].timings_ms, over their new tokens", more)
    facts = setting_facts(stats["settings"], SETTINGS)
    return Report("draft modes side by side", facts, parts, details=environment_facts(stats))


def _table(modes: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per mode; times are per generated token, speedups with their 95 % interval."""
    rows = [
        (
            TITLES.get(mode, mode),
            fixed(figures.get("accepted_length")),
            _positions(figures.get("acceptance_by_position")),
            fixed(figures.get("target_forwards"), 1),
            _phases(figures.get("phases_ms_per_token")),
            fixed(figures["tokens_per_second"], 0),
            ratio(figures.get("x_plain")),
            ratio(figures.get("x_hf")),
        )
        for mode, figures in modes.items()
    ]
    return Table(COLUMNS, rows, "runs[], medians; acceptance over runs[].records[]")


def _positions(rates: list[float] | None) -> str:
    shown = (rates or [])[:POSITIONS]
    return " ".join("1" if rate > 0.995 else f".{round(rate * 100):02d}" for rate in shown)


def _phases(phases: Mapping[str, float] | None) -> str:
    if not phases:
        return ""
    draft, verify = phases.get("draft", 0.0), phases.get("verify", 0.0)
    rest = sum(phases.values()) - draft - verify
    return f"{draft:.3f} / {verify:.3f} / {rest:.3f}"
