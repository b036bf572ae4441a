"""Numbers as texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def number(value: float | None) -> str:
    """Four digits that count, whole from 1000 on; nothing for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def fixed(value: float | None, digits: int = 2) -> str:
    """So many digits behind the point; nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def interval(found: Sequence[float] | None) -> str:
    """``low to high``; a dash for None."""
    if found is None:
        return "-"
    low, high = (f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}" for value in found)
    return f"{low} to {high}"


def ratio(found: Mapping[str, Any] | None) -> str:
    """A ratio and its interval, of ``ratio`` and ``ci95``; nothing for None."""
    if found is None:
        return ""
    text, bounds = f"{found['ratio']:.2f}", found.get("ci95")
    return text if bounds is None else f"{text} ({bounds[0]:.2f} to {bounds[1]:.2f})"


def share(value: float | None) -> str:
    """In percent; nothing for None."""
    return "" if value is None else f"{value * 100:.1f} %"
