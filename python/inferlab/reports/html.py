"""A report as one HTML file that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from inferlab.reports.model import Bars, Curves, Heading, Lines, Part, Report, Table
from inferlab.reports.svg import legend, plot_svg

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Of the page's content: a browser that holds to it loads and runs nothing."""

STYLE = """
:root { color-scheme: light dark; --text: #1d1f23; --soft: #667; --line: #d9dce3; --page: #fff;
  --alarm: #b00020; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8ec; --soft: #9aa1ad; --line: #3a3f48;
  --page: #16181d; --alarm: #ff8a80; } }
body { margin: 0 auto; padding: 12px; max-width: 1100px; background: var(--page);
  color: var(--text); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 22px; } h2 { font-size: 18px; margin: 28px 0 8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; }
.wide { overflow-x: auto; margin: 8px 0 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: pre-wrap; min-width: 14em; max-width: 32em;
  overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 12px; }
.source { color: var(--soft); font-size: 12px; margin: 0; } .alarm { color: var(--alarm); }
.plots { display: flex; flex-wrap: wrap; gap: 18px; }
figure { margin: 8px 0; flex: 1 1 320px; max-width: 400px; min-width: 0; }
figcaption { font-weight: 600; } svg.plot { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); } .mid { text-anchor: middle; }
.end { text-anchor: end; } svg path { fill: none; stroke-width: 1.8; }
svg path.grid { stroke: var(--line); stroke-width: 1; } .dashed { stroke-dasharray: 5 3; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0;
  padding: 0; font-size: 13px; } .key { width: 18px; height: 8px; margin-right: 5px; }
"""
COLOURS = (
    "#4269d0", "#e8833a", "#3ca951", "#d0406b", "#8a63d2", "#2a9d9d", "#b8860b", "#9c6b4e",
    "#c04fc0", "#7a8290",
)  # fmt: skip


def to_html(report: Report) -> str:
    """The page."""
    colours = "".join(
        f"path.c{i} {{ stroke: {c}; }} rect.c{i}, circle.c{i} {{ fill: {c}; }}\n"
        for i, c in enumerate(COLOURS)
    )
    body = [f"<h1>{_text(report.title)}</h1>", _facts(report.facts)]
    body += _parts(report.parts)
    if report.details:
        body += ["<h2>Machine and versions</h2>", _facts(report.details)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_text(report.title)}</title>\n<style>{STYLE}{colours}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _parts(parts: Sequence[Part]) -> Iterable[str]:
    """Plots that follow each other stand side by side, where there is room."""
    row: list[str] = []
    for part in parts:
        if isinstance(part, Curves | Bars):
            row.append(_figure(part))
            continue
        if row:
            yield f'<div class="plots">{"".join(row)}</div>'
            row = []
        if isinstance(part, Heading):
            yield f"<h2>{_text(part.text)}</h2>"
        elif isinstance(part, Lines):
            kind = ' class="alarm"' if part.alarm else ""
            yield "".join(f"<p{kind}>{_text(line)}</p>" for line in part.lines)
        else:
            yield _table(part)
    if row:
        yield f'<div class="plots">{"".join(row)}</div>'


def _figure(plot: Curves | Bars) -> str:
    return (
        f"<figure><figcaption>{_text(plot.title)}</figcaption>{plot_svg(plot)}{legend(plot)}"
        f"{_source(plot.source)}</figure>"
    )


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(n)}</dt><dd>{_text(v)}</dd>" for n, v in facts) + "</dl>"


def _table(table: Table) -> str:
    heads = "".join(f"<th>{_text(name)}</th>" for name in table.columns)
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="text">{_text(cell)}</td>'
            if i in table.texts
            else f"<td>{_text(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div>{_source(table.source)}"
    )


def _source(source: str) -> str:
    return f'<p class="source">from {_text(source)}</p>' if source else ""


def _text(text: str) -> str:
    """Safe between tags and in attributes; characters that HTML has not become U+FFFD."""
    return escape(re.sub("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text))
