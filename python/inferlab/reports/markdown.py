"""A report as Markdown, of the kind with tables; plots are for HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence

from inferlab.reports.model import Bars, Curves, Heading, Lines, Report, Table


def to_markdown(report: Report) -> str:
    """The text."""
    lines = [f"# {md_text(report.title)}", "", *_facts(report.facts)]
    for part in report.parts:
        if isinstance(part, Heading):
            lines += ["", f"## {md_text(part.text)}"]
        elif isinstance(part, Lines):
            lines += ["", *(f"- {md_text(line)}" for line in part.lines)]
        elif isinstance(part, Table):
            lines += ["", *_table(part)]
            if part.source:
                lines += ["", f"From {md_text(part.source)}."]
    if any(isinstance(part, Curves | Bars) for part in report.parts):
        lines += ["", "Plots are in the HTML file beside this one."]
    if report.details:
        lines += ["", "## Machine and versions", "", *_facts(report.details)]
    return "\n".join(lines) + "\n"


def _facts(facts: Sequence[tuple[str, str]]) -> list[str]:
    return [f"- {md_text(name)}: {md_text(value)}" for name, value in facts]


def _table(table: Table) -> list[str]:
    marks = ["---" if i == 0 or i in table.texts else "---:" for i in range(len(table.columns))]
    rows = [table.columns, marks, *table.rows]
    return [
        "| " + " | ".join(cell if row is marks else md_text(cell) for cell in row) + " |"
        for row in rows
    ]


def md_text(text: str) -> str:
    """Text that Markdown leaves as it is, on one line; a line's end becomes ``⏎``."""
    text = re.sub(r"\r\n|\r|\n", " ⏎ ", text)
    text = re.sub("[\0-\x1f\x7f-\x9f]", "\ufffd", text)
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", text)
