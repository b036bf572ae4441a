"""The table of all draft modes, in Markdown: readable in a terminal and in a README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from inferlab.benchmarks.modes import GENERATE, PLAIN, ModesResult
from inferlab.benchmarks.tables import id_lines

TITLES = {
    PLAIN: "plain",
    GENERATE: "HF `generate`",
    "hf-assistant": "HF `assistant_model`",
    "hf-lookup": "HF `prompt_lookup`",
}
POSITIONS = 4  # of the acceptance by position that the table shows
COLUMNS = (
    "mode", "accepted length", "accepted by position", "forwards", "draft / verify / rest, ms",
    "tokens/s", "x plain", "x HF",
)  # fmt: skip


def print_modes(result: ModesResult, console: Console | None = None) -> None:
    """Prints settings, a table per batch size, and what comparing the tokens found."""
    console = console or Console(highlight=False, width=160)
    settings = result.settings
    shown = ("base_model", "device", "dtype", "prompts", "max_new_tokens", "temperature", "seed",
             "policy", "controller", "iterations")  # fmt: skip
    console.print(", ".join(f"{key} {settings[key]}" for key in shown), markup=False)
    for size, modes in result.batches.items():
        console.print(f"\nbatch {size}", markup=False)
        console.print(modes_table(modes))
        for line in id_lines(result.token_ids[size]):
            console.print(line, markup=False)
    for failure in result.failures:
        where = f"{failure['mode']}, {failure['where']}" if "where" in failure else failure["mode"]
        console.print(f"failed: {where}: {failure['error']}", markup=False)
    if result.interrupted:
        console.print("interrupted: these are partial results", markup=False)


def modes_table(modes: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per mode; times are per generated token, speedups with their 95 % interval."""
    table = markdown_table(*COLUMNS)
    for mode, figures in modes.items():
        table.add_row(
            TITLES.get(mode, mode),
            number_text(figures.get("accepted_length")),
            _positions(figures.get("acceptance_by_position")),
            number_text(figures.get("target_forwards"), 1),
            _phases(figures.get("phases_ms_per_token")),
            number_text(figures["tokens_per_second"], 0),
            ratio_text(figures.get("x_plain")),
            ratio_text(figures.get("x_hf")),
        )
    return table


def markdown_table(*columns: str) -> Table:
    """An empty table, its first column to the left."""
    table = Table(box=box.MARKDOWN, pad_edge=True)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def number_text(value: float | None, digits: int = 2) -> str:
    """Nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def _positions(rates: list[float] | None) -> str:
    shown = (rates or [])[:POSITIONS]
    return " ".join("1" if rate > 0.995 else f".{round(rate * 100):02d}" for rate in shown)


def _phases(phases: Mapping[str, float] | None) -> str:
    if not phases:
        return ""
    draft, verify = phases.get("draft", 0.0), phases.get("verify", 0.0)
    rest = sum(phases.values()) - draft - verify
    return f"{draft:.3f} / {verify:.3f} / {rest:.3f}"


def ratio_text(found: Mapping[str, Any] | None) -> str:
    """A speedup and its interval."""
    if found is None:
        return ""
    interval = found.get("ci95")
    text = f"{found['ratio']:.2f}"
    return text if interval is None else f"{text} ({interval[0]:.2f} to {interval[1]:.2f})"
