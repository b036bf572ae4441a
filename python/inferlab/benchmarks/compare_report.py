"""The report of `inferlab bench compare`."""

from __future__ import annotations

from collections.abc import Sequence

from inferlab.benchmarks.compare import (
    ACCEPTANCE,
    LEVEL,
    SPEEDS,
    CompareStats,
    Ids,
    Metric,
    ModeComparison,
    Setting,
)
from inferlab.reports.model import Curves, Heading, Lines, Part, Report, Series, Table
from inferlab.reports.numbers import interval, number

COLUMNS = ("", "A", "B", "B / A", "95 %", "p", "prompts", "verdict")
SHOWN = 5  # of the prompts whose token ids differ


def compare_report(stats: CompareStats) -> Report:
    """What differs in settings and machine, a table per mode, and what is a regression."""
    counts = stats["prompts"]
    facts = [
        ("A", stats["a"]),
        ("B", stats["b"]),
        ("prompts in both", f"{counts['shared']} of {counts['a']} and {counts['b']}"),
        ("failed runs", f"{stats['failures'][0]} and {stats['failures'][1]}"),
    ]
    parts: list[Part] = [Lines(_setting_lines(stats))]
    for mode, found in stats["modes"].items():
        parts += [Heading(mode), *_mode(found)]
    chance = f"p: chance, all metrics together; a difference is seen below {LEVEL}"
    told = [chance]
    if any("x_hf" in found["metrics"] for found in stats["modes"].values()):
        told.append("speed is judged by x HF generate, which a drift of the machine leaves alone")
    parts += [Heading("Verdict"), Lines(told), _verdict(stats)]
    return Report("comparison of two results", facts, parts)


def _verdict(stats: CompareStats) -> Lines:
    if stats["regressions"]:
        return Lines([f"regression: {text}" for text in stats["regressions"]], alarm=True)
    text = f"nothing is slower by more than {stats['tolerance']:.1%} and beyond chance"
    text += f", acceptance has not fallen by more than {stats['acceptance_tolerance']:.1%}"
    return Lines([f"no regression: {text}"])


def _setting_lines(stats: CompareStats) -> list[str]:
    same = [] if stats["settings"] else ["settings: the same"]
    return [
        *same,
        *(_difference("setting", one) for one in stats["settings"]),
        *(_difference("environment", one) for one in stats["environment"]),
    ]


def _difference(kind: str, one: Setting) -> str:
    return f"{kind} differs: {one['name'].replace('_', ' ')}: {one['a']} | {one['b']}"


def _mode(found: ModeComparison) -> list[Part]:
    titles = {**SPEEDS, **ACCEPTANCE}
    rows = [_row(titles[key], metric) for key, metric in found["metrics"].items()]
    source = f"by_prompt, {found['runs'][0]} and {found['runs'][1]} runs"
    parts: list[Part] = [Table(COLUMNS, rows, source, texts=(7,))]
    if positions := found["acceptance_by_position"]:
        cells = [
            (str(place), number(of["a"]), number(of["b"]), *map(str, of["offered"]))
            for place, of in enumerate(positions, 1)
        ]
        heads = ("position", "accepted, A", "accepted, B", "offered, A", "offered, B")
        parts.append(Table(heads, cells, "acceptance_by_position"))
    parts.append(Lines([_ids(found["token_ids"]), *_different(found["token_ids"])]))
    if positions:
        series = [
            Series(name.upper(), [(float(i), rate) for i, of in enumerate(positions, 1)
                                  if (rate := of[name]) is not None])
            for name in ("a", "b")
        ]  # fmt: skip
        parts.append(
            Curves("Acceptance by position", "position in the draft", "accepted", series,
                   "acceptance_by_position", share=True)
        )  # fmt: skip
    return parts


def _row(title: str, metric: Metric) -> Sequence[str]:
    ratio = metric["ratio"]
    if title in ACCEPTANCE.values():
        ratio = metric["b"] / metric["a"] if metric["a"] else None
    chance = "exact" if metric["exact"] else f"{metric['p_corrected']:.3g}"
    return (
        title,
        number(metric["a"]),
        number(metric["b"]),
        number(ratio),
        interval(metric["ci95"]),
        chance,
        str(metric["prompts"]),
        metric["verdict"],
    )


def _ids(found: Ids) -> str:
    if not found["prompts"]:
        return "token ids: not in both results"
    if found["identical"] == found["prompts"]:
        return f"token ids: identical for {found['prompts']} prompts"
    return f"token ids: identical for {found['identical']} of {found['prompts']} prompts"


def _different(found: Ids) -> list[str]:
    lines = [
        f"  first at new token {one['position']}, {one['token_ids'][0]} against "
        f"{one['token_ids'][1]}: {one['prompt'][:60]!r}"
        for one in found["differences"][:SHOWN]
    ]
    more = len(found["differences"]) - SHOWN
    return [*lines, f"  and {more} more"] if more > 0 else lines
