"""A report as files."""

from __future__ import annotations

from pathlib import Path

from inferlab.output import write_text
from inferlab.reports.html import to_html
from inferlab.reports.markdown import to_markdown
from inferlab.reports.model import Report

SUFFIXES = (".md", ".html")


def write_report(report: Report, stem: str | Path) -> list[Path]:
    """Writes ``STEM.md`` and ``STEM.html``; returns both paths.

    Raises:
        UsageError: a file cannot be written.
    """
    texts = {".md": to_markdown(report), ".html": to_html(report)}
    paths = [Path(f"{stem}{suffix}") for suffix in SUFFIXES]
    for path in paths:
        write_text(path, texts[path.suffix])
    return paths
