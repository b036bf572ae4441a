"""Plots as SVG inside of a page: a few hundred bytes, texts that stay texts, colours of the page.

matplotlib's are twenty times as large, draw letters as paths, and need matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from inferlab.reports.model import Bars, Curves, Plot, Series
from inferlab.reports.scale import Axis, mark_text

COLOURS = 10
"""Classes ``c0`` to ``c9`` of the page's style; series beyond are dashed."""
WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 36
ROW = 36
"""Height of a bar with its label above it."""


def plot_svg(plot: Plot) -> str:
    """An ``<svg>`` element; what colours mean is in :func:`legend`."""
    return _curves(plot) if isinstance(plot, Curves) else _bars(plot)


def legend(plot: Plot) -> str:
    """A list of the names of series or parts."""
    names = [s.name for s in plot.series] if isinstance(plot, Curves) else list(plot.parts)
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 18 8" aria-hidden="true">'
        f'<path class="{_class(place)}" d="M0 4H18"/></svg>{escape(name)}</li>'
        for place, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def _class(place: int) -> str:
    return f"c{place % COLOURS}" + (" dashed" if place >= COLOURS else "")


def _frame(title: str, height: int, inside: list[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(inside)}</svg>'
    )


def _curves(plot: Curves) -> str:
    points = [point for series in plot.series for point in series.points]
    across = Axis([x for x, _ in points], zero=False, log=plot.log_x)
    up = Axis([0.0, 1.0] if plot.share else [y for _, y in points])
    bottom = HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + across.place(value) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return bottom - up.place(value) * (bottom - TOP)

    inside = [_grid(across, x, TOP, bottom)]
    for mark in up.marks:
        inside.append(
            f'<path class="grid" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 5}" y="{y(mark) + 4:.1f}" class="end">{mark_text(mark)}</text>'
        )
    for place, series in enumerate(plot.series):
        at = [(x(a), y(b)) for a, b in series.points]
        inside.append(f'<path class="{_class(place)}" d="{_path(at, plot.steps)}"/>')
        if not plot.steps:
            inside += [f'<circle class="{_class(place)}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>'
                       for a, b in at]  # fmt: skip
    inside.append(_axis_names(plot.x, plot.y, HEIGHT, bottom))
    return _frame(plot.title, HEIGHT, inside)


def _grid(axis: Axis, x: Callable[[float], float], top: float, bottom: float) -> str:
    return "".join(
        f'<path class="grid" d="M{x(mark):.1f} {top}V{bottom}"/>'
        f'<text x="{x(mark):.1f}" y="{bottom + 14}" class="mid">{mark_text(mark)}</text>'
        for mark in axis.marks
    )


def _axis_names(x: str, y: str, height: int, bottom: float) -> str:
    texts = f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{height - 5}" class="mid">{escape(x)}</text>'
    if y:
        middle = (TOP + bottom) / 2
        texts += (
            f'<text x="11" y="{middle:.0f}" class="mid" '
            f'transform="rotate(-90 11 {middle:.0f})">{escape(y)}</text>'
        )
    return texts


def _path(points: Sequence[tuple[float, float]], steps: bool) -> str:
    path = ""
    for place, (x, y) in enumerate(points):
        if place == 0:
            path = f"M{x:.1f} {y:.1f}"
        else:
            path += f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}"
    return path


def _bars(plot: Bars) -> str:
    totals = [sum(values[row] for values in plot.parts.values()) for row in range(len(plot.labels))]
    axis = Axis([0.0, *totals])
    left, bottom = 10, TOP + ROW * len(plot.labels)
    height = bottom + BOTTOM

    def x(value: float) -> float:
        return left + axis.place(value) * (WIDTH - left - RIGHT)

    inside = [_grid(axis, x, TOP, bottom)]
    for row, label in enumerate(plot.labels):
        top = TOP + ROW * row
        inside.append(f'<text x="{left}" y="{top + 12}">{escape(label)}</text>')
        begin = 0.0
        for place, values in enumerate(plot.parts.values()):
            end = begin + values[row]
            inside.append(
                f'<rect class="{_class(place)}" x="{x(begin):.1f}" y="{top + 17}" '
                f'width="{max(x(end) - x(begin), 0):.1f}" height="14"/>'
            )
            begin = end
    inside.append(_axis_names(plot.x, "", height, bottom))
    return _frame(plot.title, height, inside)


def distribution(name: str, values: Sequence[float], most: int = 400) -> Series:
    """The share of values that are no larger, as steps: it begins at 0 at the least of them, and
    is 1 at the largest. Of many values ``most`` quantiles are drawn."""
    ordered = sorted(values)
    count = len(ordered)
    places = range(count) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]
    points = [(ordered[place], (place + 1) / count) for place in places]
    return Series(name, [(ordered[0], 0.0), *points])
