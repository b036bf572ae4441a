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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from inferlab import _C

VERSION = 6
"""Of the file format, and of how times are measured."""
READ_BEHIND = 64
"""Tokens that those that are read see in the mean, where reading is measured."""
READ_SIZES = (32, 64, 128)
NEARLY = 0.85


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
        ms: float = _compiled_step(self).ms(batch, batch * nodes, context)
        return ms


@dataclass(frozen=True)
class DraftCosts:
    """Measured times of drafting; between and beyond them, lines.

    Attributes:
        table: by batch, then by nodes of the budget, ms; both growing.
        reading: by tokens, ms to read texts before the first draft for them; both growing.
        slowed: how many times as long all else takes in a step that drafts.
    """

    table: tuple[tuple[int, tuple[tuple[int, float], ...]], ...]
    reading: tuple[tuple[int, float], ...] = ()
    slowed: float = 1.0

    def __post_init__(self) -> None:
        for row in (*(row for _, row in self.table), self.reading or ((0, 0.0),)):
            if not row or not all(0 <= ms < math.inf for _, ms in row):
                raise ValueError("table and reading must hold times, finite and not negative")
        if not 1 <= self.slowed < math.inf:
            raise ValueError(f"slowed is {self.slowed}, must be finite and at least 1")

    @classmethod
    def of(
        cls,
        times: Sequence[DraftTime],
        reading: Sequence[tuple[int, float]] = (),
        *,
        chains: bool = False,
        slowed: float = 1.0,
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
        return cls(tuple(table), tuple((tokens, float(v)) for (tokens, _), v in read), slowed)

    def ms(self, batch: int, nodes: float) -> float:
        """What a budget of so many nodes adds to a step; ``nodes`` may be a mean."""
        ms: float = _compiled_draft(self).ms(batch, nodes)
        return ms


@dataclass(frozen=True)
class CostModel:
    """Times of whole steps of one engine.

    Attributes:
        reading: by tokens, ms of a forward that reads the beginnings of texts; both growing. Empty:
            not measured.
    """

    step: StepCosts
    draft: DraftCosts = DraftCosts(())
    reading: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        sizes = [0, *(tokens for tokens, _ in self.reading)]
        growing = all(before < after for before, after in pairwise(sizes))
        if not growing or not all(0 <= ms < math.inf for _, ms in self.reading):
            raise ValueError("reading must hold times of growing numbers of tokens")

    def ms(self, batch: int, nodes: int, context: float) -> float:
        """A step that drafts ``nodes`` for each sequence (0: none) and verifies them."""
        return self.verify_ms(batch, nodes, context) + self.draft.ms(batch, nodes)

    def verify_ms(self, batch: int, nodes: float, context: float) -> float:
        """All but drafting of such a step; ``nodes`` may be a mean."""
        slowed = self.draft.slowed if nodes > 0 else 1.0
        return self.step.ms(batch, 1 + nodes, context) * slowed

    def reading_ms(self, texts: int, tokens: int, context: float) -> float:
        """A forward that reads parts of texts.

        Args:
            tokens: of all together.
            context: that each sees, in the mean.
        """
        if not self.reading:
            return self.step.ms(texts, tokens / texts, context)
        sizes, times = zip((1, self.step.ms(1, 1, 0)), *self.reading, strict=True)
        ms = float(np.interp(tokens, sizes, times))
        if tokens > sizes[-1]:
            ms *= tokens / sizes[-1]
        beyond = max(context - READ_BEHIND, 0.0)
        return ms + (self.step.per_key * texts + self.step.per_product * tokens) * beyond

    def read_at_once(self) -> int:
        """The fewest tokens, of READ_SIZES, of which nearly as many are read per millisecond as of
        any: a text that is read in parts of so many holds up others least."""
        rates = [tokens / self.reading_ms(1, tokens, READ_BEHIND) for tokens in READ_SIZES]
        nearly = NEARLY * max(rates)
        return next(size for size, rate in zip(READ_SIZES, rates, strict=True) if rate >= nearly)

    def planner(self, measured: bool = True) -> Any:
        """The compiled one that decides by these: ``csrc/planner/planner.h``."""
        return _C.planner.Planner(_compiled_step(self.step), _compiled_draft(self.draft), measured)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Raises ValueError where ``text`` is not what `to_json` writes."""
        try:
            fields = json.loads(text)
            if fields["version"] != VERSION:
                raise ValueError(f"version is {fields['version']}, not {VERSION}")
            _check_numbers([fields["step"], fields["draft"], fields.get("reading", [])])
            if not all(n >= 1 for n in fields["step"]["rows"]) or not all(
                ms > 0 for ms in fields["step"]["own"]
            ):
                raise ValueError("no costs: rows and their times must be above 0")
            step = StepCosts(**{k: _frozen(v) for k, v in fields["step"].items()})
            draft = DraftCosts(**{k: _frozen(v) for k, v in fields["draft"].items()})
            model = cls(step, draft, _frozen(fields.get("reading", [])))
            model.planner()  # which checks the rest
            return model
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"no costs: {error!r}") from error


@lru_cache(maxsize=64)
def _compiled_step(costs: StepCosts) -> Any:
    own = list(zip(costs.rows, costs.own, strict=True))
    return _C.planner.StepCosts(own, costs.per_sequence, costs.per_key, costs.per_product)


@lru_cache(maxsize=64)
def _compiled_draft(costs: DraftCosts) -> Any:
    reading = [(0, 0.0), *costs.reading] if costs.reading else []
    return _C.planner.DraftCosts(costs.table, reading, costs.slowed)


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


def _check_numbers(value: Any) -> None:
    """Raises TypeError for what holds other things than finite numbers."""
    if isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            _check_numbers(one)
    elif type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
