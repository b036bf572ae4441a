"""Figures, where matplotlib is installed."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches, without a window.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("matplotlib is missing; pip install 'llm-inference-lab[train]'") from error
    return Figure(figsize=(width, height), layout="constrained")
