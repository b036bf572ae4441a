"""Plots as an image file, by matplotlib where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inferlab.plots import new_figure
from inferlab.reports.model import Bars, Curves, Plot


def draw_plots(plots: Sequence[Plot], path: Path) -> None:
    """Draws plots side by side into a PNG.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = new_figure(4.5 * len(plots), 4)
    places = figure.subplots(1, len(plots), squeeze=False)[0]
    for axes, plot in zip(places, plots, strict=True):
        axes.set_title(plot.title)
        axes.set_xlabel(plot.x)
        if isinstance(plot, Curves):
            _draw_curves(axes, plot)
        else:
            _draw_bars(axes, plot)
    figure.savefig(path)


def _draw_curves(axes: Any, plot: Curves) -> None:
    for series in plot.series:
        x, y = zip(*series.points, strict=True)
        style = {"drawstyle": "steps-post"} if plot.steps else {"marker": "o"}
        axes.plot(x, y, label=series.name, **style)
    if plot.log_x:
        axes.set_xscale("log")
    axes.set_ylim(0, 1 if plot.share else None)
    axes.set_ylabel(plot.y)
    axes.legend()


def _draw_bars(axes: Any, plot: Bars) -> None:
    begin = [0.0] * len(plot.labels)
    for name, values in plot.parts.items():
        axes.barh(list(plot.labels), list(values), left=begin, label=name)
        begin = [low + value for low, value in zip(begin, values, strict=True)]
    axes.invert_yaxis()
    if len(plot.parts) > 1:
        axes.legend()
