"""Advice as JSON, as tables and as a plot."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from inferlab.benchmarks.advice import Forecast
from inferlab.benchmarks.advisor import Advice, Verified
from inferlab.plots import new_figure

HEADS = ("batch", "mode", "K", "nodes", "x plain (95 %)", "tokens/s", "length", "needed",
         "acceptance", "needed")  # fmt: skip


class Expected(TypedDict):
    """A forecast, see `inferlab.benchmarks.advice.Forecast`; ``nodes`` is null where the mode's
    usual number, or a chain, is meant."""

    draft_mode: str
    K: int
    nodes: int | None
    flags: str
    batch: int
    pays: bool
    speedup: float
    ci95: tuple[float, float]
    tokens_per_second: float
    length: float
    needed_length: float
    acceptance: float
    needed_acceptance: float | None
    rough: bool
    exact: float


class Result(TypedDict):
    """What came of the best forecast of a batch size."""

    speedup: float
    ci95: tuple[float, float] | None
    off: float


class AdviceStats(TypedDict):
    """The JSON of an advice: ``best`` and ``verified`` by batch size, ``curve`` by mode."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    best: dict[int, list[Expected]]
    curve: dict[str, list[Expected]]
    left_out: dict[str, str]
    verified: NotRequired[dict[int, Result]]


def as_json(advice: Advice, verified: Mapping[int, Verified] | None = None) -> AdviceStats:
    """The advice, and what came of it where that was verified."""
    stats: AdviceStats = {
        "environment": advice.environment,
        "settings": advice.settings,
        "best": {size: [_expected(f) for f in found] for size, found in advice.best.items()},
        "curve": {mode: [_expected(f) for f in found] for mode, found in advice.curve.items()},
        "left_out": advice.left_out,
    }
    if verified is not None:
        stats["verified"] = {
            size: {"speedup": v.speedup, "ci95": v.interval, "off": v.off}
            for size, v in verified.items()
        }
    return stats


def _expected(found: Forecast) -> Expected:
    return {
        "draft_mode": found.setting.mode,
        "K": found.setting.levels,
        "nodes": found.setting.nodes,
        "flags": str(found.setting),
        "batch": found.batch,
        "pays": found.pays,
        "speedup": found.speedup,
        "ci95": found.interval,
        "tokens_per_second": found.tokens_per_second,
        "length": found.length,
        "needed_length": found.needed_length,
        "acceptance": found.acceptance,
        "needed_acceptance": found.needed_acceptance,
        "rough": found.rough,
        "exact": found.exact,
    }


def report(advice: Advice, verified: Mapping[int, Verified] | None = None) -> str:
    """What to do at each batch size, what each mode would give and needs, what was left out, and
    what came of it."""
    settings = advice.settings
    lines = [", ".join(f"{key} {value}" for key, value in settings.items()), ""]
    for size, found in advice.best.items():
        lines.append(f"batch {size}: {_advised(found[0] if found else None)}")
    rows = [_row(forecast) for found in advice.best.values() for forecast in found]
    lines += ["", *_table(HEADS, rows)] if rows else []
    if any(forecast.rough for found in advice.best.values() for forecast in found):
        lines.append(
            "~: roughly, cut from larger drafts; the others were recorded as they would run"
        )
    lines += [f"left out: {mode}: {why}" for mode, why in advice.left_out.items()]
    if verified:
        lines += ["", *_table(("batch", "setting", "predicted", "measured (95 %)", "off"),
                              [_verified(v) for v in verified.values()])]  # fmt: skip
    return "\n".join(lines)


def _advised(best: Forecast | None) -> str:
    if best is None:
        return "decode plainly: there is nothing to draft with"
    expected = f"{best.speedup:.2f} x plain decoding {_interval(best.interval)}"
    if best.pays:
        return f"{best.setting}: {expected}"
    return f"do not speculate: at best {expected}, by {best.setting}"


def _row(found: Forecast) -> tuple[str, ...]:
    setting = found.setting
    needed = found.needed_acceptance
    return (
        str(found.batch),
        setting.mode,
        str(setting.levels),
        "" if setting.nodes is None else str(setting.nodes),
        f"{'~' if found.rough else ''}{found.speedup:.2f} {_interval(found.interval)}",
        f"{found.tokens_per_second:.0f}",
        f"{found.length:.2f}",
        f"{found.needed_length:.2f}",
        f"{found.acceptance:.2f}",
        "never" if needed is None else f"{needed:.2f}",
    )


def _verified(found: Verified) -> tuple[str, ...]:
    interval = "" if found.interval is None else f" {_interval(found.interval)}"
    return (
        str(found.forecast.batch),
        str(found.forecast.setting),
        f"{found.forecast.speedup:.2f}",
        f"{found.speedup:.2f}{interval}",
        f"{found.off:+.0%}",
    )


def _interval(interval: tuple[float, float]) -> str:
    return f"({interval[0]:.2f} to {interval[1]:.2f})"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Texts to the left, numbers to the right."""
    columns = list(zip(heads, *rows, strict=True))
    texts = [any(cell[:1].isalpha() or cell[:1] == "-" for cell in column[1:] if cell != "never")
             for column in columns]  # fmt: skip
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            f"{cell:<{width}}" if text else f"{cell:>{width}}"
            for cell, width, text in zip(row, widths, texts, strict=True)
        ).rstrip()
        for row in (heads, *rows)
    ]


def draw(advice: Advice, path: Path) -> bytes:
    """A plot of the acceptance that is needed, and of the one that is to be expected, by batch
    size: drafting pays where the second is above the first.

    Args:
        path: its suffix, one of `plots.SUFFIXES`, is the format.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for number, (mode, found) in enumerate(advice.curve.items()):
        color = f"C{number}"
        batches = [forecast.batch for forecast in found]
        needed = [forecast.needed_acceptance for forecast in found]
        shown = [float("nan") if share is None else share for share in needed]
        axes.plot(batches, shown, color=color, marker=".", label=mode)
        reached = [forecast.acceptance for forecast in found]
        axes.plot(batches, reached, color=color, linestyle="--", linewidth=1)
    sizes = sorted({f.batch for found in advice.curve.values() for f in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(ylim=(0, 1), xlabel="batch size", ylabel="chance to pass a level")
    axes.set_title(
        f"{advice.settings['base_model']}: acceptance to break even (lines), expected (dashed)"
    )
    if advice.curve:
        figure.legend(loc="outside right upper", fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=100)
    return drawn.getvalue()
