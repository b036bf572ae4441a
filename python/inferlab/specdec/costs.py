"""What a step costs: its time by rows, batch and context, from a few measured ones. No torch.

A step of B sequences with N nodes each (the root included) behind C tokens takes

    ms(B, N, C) = own(B N) + a B + b B C + c B N C

* own: what the rows of a forward take. Weights are read once for all of them, so it is flat at
  first and rises where arithmetic is what counts: a line between measured numbers of rows;
* a: what is done for each sequence (walks, tokens, pages);
* b, c: the keys and values that are read, and the products with them.

All four are at least 0 and fitted to measured steps, each of which counts by its relative error.
Drafting comes on top: a table by batch and budget.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np

VERSION = 3
"""Of the file format, and of how times are measured."""


class StepTime(NamedTuple):
    """A measured step: ``batch`` sequences of ``nodes`` rows each, behind ``context`` tokens."""

    batch: int
    nodes: int
    context: int
    ms: float


class DraftTime(NamedTuple):
    """What drafting added to a step: proposing, and keeping the drafter's state."""

    batch: int
    nodes: int  # of the budget, root not counted; 0: it drafts nothing, but keeps up
    ms: float


@dataclass(frozen=True)
class StepCosts:
    """The fitted formula.

    Attributes:
        rows: numbers of rows that were measured, growing.
        own: ms of each.
        per_sequence, per_key, per_product: a, b, c, in ms.
        error: median of |predicted / measured - 1| over the measured steps.
    """

    rows: tuple[int, ...]
    own: tuple[float, ...]
    per_sequence: float = 0.0
    per_key: float = 0.0
    per_product: float = 0.0
    error: float = 0.0

    def __post_init__(self) -> None:
        slopes = (self.per_sequence, self.per_key, self.per_product)
        if not self.rows or len(self.rows) != len(self.own):
            raise ValueError("own must hold the ms of each of at least one number of rows")
        if not all(0 <= value < math.inf for value in (*self.rows, *self.own, *slopes)):
            raise ValueError("rows and times must be finite and not negative")

    @classmethod
    def fit(cls, steps: Sequence[StepTime]) -> StepCosts:
        """Least squares of relative errors.

        Raises:
            ValueError: no step, or one without rows or time.
        """
        if not steps or any(min(s.batch, s.nodes) < 1 or s.ms <= 0 for s in steps):
            raise ValueError("steps must hold measured steps of at least one row and above 0 ms")
        rows = sorted({s.batch * s.nodes for s in steps})
        matrix = np.zeros((len(steps), len(rows) + 3))
        for i, s in enumerate(steps):
            matrix[i, rows.index(s.batch * s.nodes)] = 1
            # Of the first sequence nothing can be told from `own`.
            matrix[i, -3:] = s.batch - 1, s.batch * s.context, s.batch * s.nodes * s.context
        if len({s.context for s in steps}) == 1:
            matrix[:, -2:] = 0  # nor of one context
        weights = 1 / np.array([s.ms for s in steps])
        scale = np.maximum(matrix.max(axis=0), 1)
        found = _non_negative(matrix * weights[:, None] / scale, np.ones(len(steps))) / scale
        own = [float(v) for v in np.maximum.accumulate(found[:-3])]  # more rows take no less
        fitted = cls(tuple(rows), tuple(own), *map(float, found[-3:]))
        errors = [abs(fitted.ms(*s[:3]) / s.ms - 1) for s in steps]
        return replace(fitted, error=median(errors))

    def ms(self, batch: int, nodes: float, context: float) -> float:
        """Predicted time of a step, without drafting; ``nodes`` may be a mean."""
        rows = batch * nodes
        return (
            _on_line(self.rows, self.own, rows)
            + self.per_sequence * (batch - 1)
            + self.per_key * batch * context
            + self.per_product * rows * context
        )

    def ms_up_to(self, batch: int, rows: int, context: float) -> np.ndarray:
        """Predicted times of steps with 0, 1, ... ``rows`` rows in all; below ``batch`` as with one
        for each sequence."""
        count = np.maximum(np.arange(rows + 1), batch)
        own = np.interp(count, self.rows, self.own)
        if len(self.rows) > 1:
            slope = (self.own[-1] - self.own[-2]) / (self.rows[-1] - self.rows[-2])
            own += slope * np.maximum(count - self.rows[-1], 0)
        fixed = self.per_sequence * (batch - 1) + self.per_key * batch * context
        ms: np.ndarray = own + fixed + self.per_product * count * context
        return ms


@dataclass(frozen=True)
class DraftCosts:
    """Measured times of drafting; between and beyond them, lines.

    Attributes:
        table: by batch, then by nodes of the budget, ms; both growing.
        reading: by tokens, ms to read texts before the first draft for them; both growing.
    """

    table: tuple[tuple[int, tuple[tuple[int, float], ...]], ...]
    reading: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for row in (*(row for _, row in self.table), self.reading or ((0, 0.0),)):
            if not row or not all(0 <= ms < math.inf for _, ms in row):
                raise ValueError("table and reading must hold times, finite and not negative")

    @classmethod
    def of(
        cls,
        times: Sequence[DraftTime],
        reading: Sequence[tuple[int, float]] = (),
        *,
        chains: bool = False,
    ) -> DraftCosts:
        """More nodes, and more tokens, never take less: what was measured so is noise. (Texts are
        read once each, so noise there is a first time, which is longer.)

        Args:
            chains: a node is a level, and all levels take the same.
        """
        table = []
        for batch in sorted({t.batch for t in times}):
            row = sorted((t.nodes, t.ms) for t in times if t.batch == batch)
            if chains:
                row = _straightened(row)
            rising = np.maximum.accumulate([max(ms, 0.0) for _, ms in row])
            table.append(
                (batch, tuple((n, float(v)) for (n, _), v in zip(row, rising, strict=True)))
            )
        falling = np.minimum.accumulate([max(ms, 0.0) for _, ms in sorted(reading)[::-1]])
        read = zip(sorted(reading), falling[::-1], strict=True)
        return cls(tuple(table), tuple((tokens, float(v)) for (tokens, _), v in read))

    def reading_ms(self, tokens: int) -> float:
        """What reading so many tokens takes, of however many texts."""
        if not self.reading or tokens <= 0:
            return 0.0
        return _on_line(
            (0, *(n for n, _ in self.reading)), (0.0, *(v for _, v in self.reading)), tokens
        )

    def ms(self, batch: int, nodes: float) -> float:
        """What a budget of so many nodes adds to a step; ``nodes`` may be a mean."""
        if not self.table:
            return 0.0
        batches = [batch for batch, _ in self.table]
        by_batch = []
        for _, row in self.table:
            offered, ms = zip(*row, strict=True)
            by_batch.append(_on_line(offered, ms, nodes))
        return _on_line(batches, by_batch, batch)


@dataclass(frozen=True)
class CostModel:
    """Times of whole steps of one engine."""

    step: StepCosts
    draft: DraftCosts = DraftCosts(())

    def ms(self, batch: int, nodes: int, context: float) -> float:
        """A step that drafts ``nodes`` for each sequence (0: none) and verifies them."""
        return self.step.ms(batch, 1 + nodes, context) + self.draft.ms(batch, nodes)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Raises ValueError where ``text`` is not what `to_json` writes."""
        try:
            fields = json.loads(text)
            if fields["version"] != VERSION:
                raise ValueError(f"version is {fields['version']}, not {VERSION}")
            step = StepCosts(**{k: _frozen(v) for k, v in fields["step"].items()})
            return cls(step, DraftCosts(**{k: _frozen(v) for k, v in fields["draft"].items()}))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no costs: {error!r}") from error


class Pace:
    """How slow a machine is just now, relative to the times that are known of it."""

    LAST = 3

    def __init__(self) -> None:
        self._last: list[float] = []
        self.factor = 1.0
        """What predictions are to be multiplied with."""

    def observe(self, predicted: float, measured: float) -> None:
        """A time, of whatever kind, and what it was to be at a factor of 1."""
        if min(predicted, measured) > 0:
            self._last.append(math.log(measured / predicted))
            del self._last[: -self.LAST]
            self.factor = math.exp(_median(self._last))


class Drift:
    """How far real times are from predicted ones, one kind more than another.

    What is of one kind is corrected by the median of its own last ratios, the fewer there are the
    more by what all kinds have in common. Once is chance; two in a row that are far off in the same
    direction say that times have changed, and what was before is forgotten.
    """

    KEPT = 15
    FAR = math.log(1.6)
    SHARED = 1.5  # weight of what is common, in observations

    def __init__(self) -> None:
        self._of_kind: dict[Any, list[float]] = {}
        self._common: list[float] = []
        self._middle = 0.0  # of what is common
        self._near: dict[Any, float] = {}  # of each kind
        self._known: dict[Any, float] = {}  # factors

    def observe(self, kind: Any, predicted: float, measured: float) -> None:
        """``kind``: anything hashable, such as batch size and budget."""
        if min(predicted, measured) <= 0:
            return
        ratio = math.log(measured / predicted)
        own = self._of_kind.setdefault(kind, [])
        self._near[kind] = self._add(own, ratio)
        self._middle = self._add(self._common, ratio)
        self._known.clear()

    def _add(self, ratios: list[float], ratio: float) -> float:
        """Adds one; returns the median."""
        ratios.append(ratio)
        del ratios[: -self.KEPT]
        middle = _median(ratios)
        if len(ratios) > 3:
            far = [value - middle for value in ratios[-2:]]
            if min(map(abs, far)) > self.FAR and far[0] * far[1] > 0:
                del ratios[:-2]
                middle = _median(ratios)
        return middle

    def factor(self, kind: Any) -> float:
        """What a prediction is to be multiplied with."""
        found = self._known.get(kind)
        if found is None:
            own = len(self._of_kind.get(kind, ()))
            log = own * self._near.get(kind, 0.0) + self.SHARED * self._middle
            found = self._known[kind] = math.exp(log / (own + self.SHARED))
        return found


def _median(values: Sequence[float]) -> float:
    """`statistics.median` at a tenth of its price: it is asked in every step."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def _on_line(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """On the lines between points; beyond the last as from the last but one, before the first
    flat."""
    if len(xs) == 1 or x <= xs[0]:
        return ys[0]
    i = min(bisect_right(xs, x), len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + slope * (x - xs[i - 1])


def _straightened(row: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Times of one node and more on the line that fits them best: their differences decide."""
    drafted = [(nodes, ms) for nodes, ms in row if nodes > 0]
    if len(drafted) < 3:
        return row
    nodes, times = np.array(drafted).T
    slope, first = np.polyfit(nodes, times, 1)
    return [(n, float(first + slope * n) if n > 0 else ms) for n, ms in row]


def _non_negative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares with no negative part: the most negative is set to 0 until there is none."""
    found = np.zeros(matrix.shape[1])
    left = list(range(matrix.shape[1]))
    while left:
        part = np.linalg.lstsq(matrix[:, left], target, rcond=None)[0]
        if part.min() >= 0:
            found[left] = part
            break
        del left[int(part.argmin())]
    return found


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
