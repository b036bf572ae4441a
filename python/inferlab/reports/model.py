"""What a report is: facts, lines, tables and plots, in order, whoever shows them.

Every table and plot names its ``source``, the place in the result's JSON where its raw rows are:
``runs[].latency_ms`` is that key of each entry of the list ``runs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Lines:
    """Sentences; with ``alarm`` they say what went wrong."""

    lines: Sequence[str]
    alarm: bool = False


@dataclass(frozen=True)
class Heading:
    """What the following parts are of."""

    text: str


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first column is to the left, all others are figures.

    Attributes:
        columns: names, with units.
        detail: for files alone, not for a terminal.
        texts: columns of texts of any length, by their places.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    source: str = ""
    detail: bool = False
    texts: Sequence[int] = ()


@dataclass(frozen=True)
class Series:
    """Points (x, y) under one name."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """Series over two axes.

    Attributes:
        x, y: names of the axes, with units.
        steps: y holds from a point on until the next; otherwise points are marked and joined.
        share: y goes from 0 to 1.
        log_x: x is drawn by its logarithm.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    source: str = ""
    steps: bool = False
    share: bool = False
    log_x: bool = False


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, a row for each label, each made of parts laid end to end.

    Attributes:
        x: name of the axis, with its unit.
        parts: name -> value of each label.
    """

    title: str
    x: str
    labels: Sequence[str]
    parts: Mapping[str, Sequence[float]]
    source: str = ""


Plot = Curves | Bars
Part = Heading | Lines | Table | Curves | Bars


@dataclass(frozen=True)
class Report:
    """All that is shown of a result.

    Attributes:
        facts: (name, value): what was measured, on what.
        details: more such, for files alone: versions, processor.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    parts: Sequence[Part]
    details: Sequence[tuple[str, str]] = field(default=())

    @property
    def tables(self) -> list[Table]:
        return [part for part in self.parts if isinstance(part, Table)]

    @property
    def plots(self) -> list[Plot]:
        return [part for part in self.parts if isinstance(part, Curves | Bars)]
