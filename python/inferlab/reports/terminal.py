"""A report on stdout: tables where that is a terminal, elsewhere plain lines and Markdown."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from inferlab.reports.model import Bars, Curves, Heading, Lines, Report, Table

UNBOUNDED = 100_000
"""Columns of what is no terminal: no line is broken, and no cell cut off."""
GAP = 2
"""Between the columns of a table."""
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)
}
"""What would move the cursor, or worse: names come from servers and from files."""


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints title, facts, tables and lines; plots, and what is detail, are for files."""
    console = console or _console()
    _print(console, report.title, "bold")
    for name, value in report.facts:
        _print(console, f"{name}: {value}")
    heading, before = None, None
    for part in report.parts:
        if isinstance(part, Heading):
            heading = part
            continue
        if isinstance(part, Curves | Bars) or (isinstance(part, Table) and part.detail):
            continue
        if heading is not None:
            console.print()
            _print(console, heading.text, "bold")
            heading = None
        elif isinstance(part, Table) and isinstance(before, Table):
            console.print()
        before = part
        if isinstance(part, Lines):
            for line in part.lines:
                _print(console, line, "bold" if part.alarm else "")
        elif console.is_terminal:
            _print_table(console, part)
        else:
            for line in plain_table(part):
                _print(console, line)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=UNBOUNDED)


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(_shown(text, style), soft_wrap=True)


def _shown(text: str, style: str = "") -> Text:
    return Text(text.translate(_CONTROLS), style=style)


def plain_table(table: Table) -> list[str]:
    """The lines of a Markdown table whose columns are as wide as their cells."""
    left = [place == 0 or place in table.texts for place in range(len(table.columns))]
    rows = [tuple(map(_on_one_line, row)) for row in (table.columns, *table.rows)]
    widths = [max(3, *(cell_len(row[place]) for row in rows)) for place in range(len(left))]
    lines = []
    for row in rows:
        pads = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [
            cell + pad if is_left else pad + cell
            for cell, pad, is_left in zip(row, pads, left, strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    marks = ["-" * width if is_left else "-" * (width - 1) + ":"
             for width, is_left in zip(widths, left, strict=True)]  # fmt: skip
    return [lines[0], "| " + " | ".join(marks) + " |", *lines[1:]]


def _on_one_line(text: str) -> str:
    return " ".join(text.splitlines()).translate(_CONTROLS)


def _print_table(console: Console, table: Table) -> None:
    """In blocks of columns, each with the first, where the terminal is too narrow for all."""
    for places in _blocks(table, console.width):
        drawn = Drawn(box=None, pad_edge=False, header_style="dim")
        for place in places:
            left = place == 0 or place in table.texts
            name = _shown(table.columns[place])
            drawn.add_column(name, justify="left" if left else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(_shown(row[place]) for place in places))
        console.print(drawn)


def _blocks(table: Table, width: int) -> list[list[int]]:
    rows = (table.columns, *table.rows)
    widths = [max(cell_len(row[place]) for row in rows) for place in range(len(table.columns))]
    blocks = [[0]]
    for place in range(1, len(widths)):
        taken = sum(widths[other] + GAP for other in blocks[-1])
        if len(blocks[-1]) > 1 and taken + widths[place] > width:
            blocks.append([0])
        blocks[-1].append(place)
    return blocks
