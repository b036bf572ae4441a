"""A measured row as text: the columns of the table that a run prints and that a report holds.

    time us     median time of one call
    spread      distance of the quartiles over the median: how quiet the machine was
    must move   bytes that any implementation moves (floors.py)
    GB/s        those bytes over that time
    of b/w      of the device's bandwidth, measured in the same run far beyond its caches: by a read
                where the op reads (CPU), by a copy where it copies, and on CUDA always
    of plain    time of a plain read or copy of as many bytes, timed in turns with the op, over the
                op's time: 1 is as fast as memory allows at this size
    x torch     how many times as fast as the torch way; likewise each peer
    timed by    the wall clock; CUDA events around a graph's replay; events around eager calls
Blank: memory is not what bounds the op at this shape, or there is nothing to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Shape = dict[str, Any]

RIVALS = ("torch", "FlashInfer", "sgl-kernel")


def label(shape: Shape) -> str:
    """How a shape is written in tables: sizes with their names, words (dtypes, trees) alone."""
    return " ".join(v if isinstance(v, str) else f"{k}={v}" for k, v in shape.items())


def number(value: float | None, digits: int = 3) -> str:
    """Rounded to `digits` significant digits, without an exponent."""
    if value is None:
        return ""
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(0, digits - whole)}f}"


def amount(num_bytes: float) -> str:
    if not num_bytes:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{number(num_bytes / scale)} {unit}"
    return f"{num_bytes:.0f} B"


def fraction(row: Row, key: str) -> str:
    return "" if row[key] is None else f"{row[key]:.2f}"


def case(row: Row) -> str:
    note = f" ({row['note']})" if row["note"] else ""
    return f"{row['variant']} {label(row['shape'])}".strip() + note


def columns(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Titles and cells of the columns in which any row has something to say."""
    present = [r for r in RIVALS if any(r in row["times_as_fast_as"] for row in rows)]
    table = [
        ("case", [case(row) for row in rows]),
        ("time us", [number(row["time_us"]) for row in rows]),
        ("spread", [f"{100 * row['spread']:.0f} %" for row in rows]),
        ("must move", [amount(row["bytes"]) for row in rows]),
        ("GB/s", [number(row["gb_per_s"]) if row["bound"] else "" for row in rows]),
        (
            "of b/w",
            [
                f"{fraction(row, 'fraction_of_bandwidth')} {row['bound']}" if row["bound"] else ""
                for row in rows
            ],
        ),
        ("of plain", [fraction(row, "fraction_of_plain") for row in rows]),
        *(
            (f"x {rival}", [number(row["times_as_fast_as"].get(rival), 2) for row in rows])
            for rival in present
        ),
        ("timed by", [row["timed_by"] for row in rows]),
    ]
    return [(title, cells) for title, cells in table if any(cells)]


def text(rows: Sequence[Row]) -> list[str]:
    """Aligned lines, the rows of each op under its name."""
    lines = []
    titles = columns(rows)
    widths = [max(len(title), *(len(c) for c in cells)) for title, cells in titles]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))
        return "  ".join((first, *rest)).rstrip()

    op = None
    for row, *cells in zip(rows, *(cells for _, cells in titles), strict=True):
        if row["op"] != op:
            op = row["op"]
            lines += ["", op, line([title for title, _ in titles])]
        lines.append(line(cells))
    return lines


def markdown(rows: Sequence[Row]) -> list[str]:
    """A Markdown table of one op's rows."""
    titles = columns(rows)
    head = "| " + " | ".join(title for title, _ in titles) + " |"
    rule = "| --- |" + " ---: |" * (len(titles) - 1)
    body = ("| " + " | ".join(cells) + " |" for cells in zip(*(c for _, c in titles), strict=True))
    return [head, rule, *body]
