"""Figures, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inferlab.errors import UsageError
from inferlab.output import check_output

SUFFIXES = (".svg", ".png", ".pdf")


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches, without a window.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("matplotlib is missing; pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def check_plot(path: str | Path, flag: str) -> None:
    """Refuses the file of a ``flag`` that cannot be drawn before the work is done.

    Raises:
        UsageError: its suffix is none of SUFFIXES, it cannot be written, or matplotlib is missing.
    """
    if Path(path).suffix not in SUFFIXES:
        raise UsageError(f"{flag}: {path} must end in {' or '.join(SUFFIXES)}")
    check_output(path, flag)
    try:
        new_figure(1, 1)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error
