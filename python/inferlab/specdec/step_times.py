"""What steps of a running engine take: the cost model's times, corrected while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from inferlab.specdec.costs import CostModel, Drift, Pace
from inferlab.specdec.tree import Budget


class StepTimes:
    """Milliseconds of verifying, drafting and reading, by kinds of steps that are off alike.

    A machine that others use is slow for some steps, then fast again. That concerns all kinds, so
    it is told by the last few steps, whichever they were; what kinds are off beyond it is lasting.

    Attributes:
        context: tokens behind a sequence, on average, that was last asked about.
    """

    MOST_TABLES = 256

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.context = 0.0
        self._pace = Pace()
        self._verifying, self._drafting, self._reading = Drift(), Drift(), Drift()
        self._rungs: Sequence[Budget] = ()
        self._chains = False
        self._tables: dict[Any, Any] = {}

    def climb(self, rungs: Sequence[Budget]) -> None:
        """From here on drafts are as large as these."""
        self._rungs = rungs
        self._chains = all(b.levels == b.nodes for b in rungs)
        self._tables.clear()

    # What is predicted.

    def model(self, size: int, rows: int) -> float:
        """A step's, as the cost model has it."""
        return max(self.costs.step.ms(size, rows / size, self.context), 1e-6)

    def step(self, size: int, rows: int) -> float:
        """A step's without drafting, corrected."""
        off = self._pace.factor * self._verifying.factor(_kind(size, rows))
        return self.model(size, rows) * off

    def plain(self, size: int, context: float) -> float:
        """A step's without drafts, corrected."""
        self.context = _rounded(context)
        return self.step(size, size)

    def verify(self, size: int, context: float) -> np.ndarray:
        """The same of all numbers of rows from 0 on, never falling."""
        self.context = context = _rounded(context)
        table = self._tables.get((size, context))
        if table is None:
            if len(self._tables) > self.MOST_TABLES:
                self._tables.clear()
            most = size * (1 + self._rungs[-1].nodes)
            ms = self.costs.step.ms_up_to(size, most, context)
            rows = np.maximum(np.arange(most + 1), size)
            kinds = 2 * np.log2(rows / size) + 1
            kinds[rows == size] = 0
            count = int(np.rint(kinds[-1])) + 1
            table = self._tables[size, context] = np.maximum(ms, 1e-6), kinds, np.arange(count)
        ms, kinds, all_kinds = table
        bits, factor = size.bit_length(), self._verifying.factor
        factors = [self._pace.factor * factor((bits, i - 1)) for i in range(len(all_kinds))]
        # Between kinds on a line: it is differences that decide.
        corrected: np.ndarray = ms * np.interp(kinds, all_kinds, factors)
        return np.maximum.accumulate(corrected)

    def draft(self, members: int) -> np.ndarray:
        """By rung: what drafting for so many takes."""
        table = self._tables.get(members)
        if table is None:
            costs = self.costs.draft
            ms = [costs.ms(members, b.nodes) if members else 0.0 for b in self._rungs]
            table = self._tables[members] = np.array(ms)
        factor, pace = self._drafting.factor, self._pace.factor
        if self._chains:
            return table * (pace * factor(self._kind_of_draft(members, self._rungs[-1])))
        factors = [factor(self._kind_of_draft(members, b)) for b in self._rungs]
        return table * (pace * np.array(factors))

    def read(self, tokens: int) -> float:
        """What a drafter takes to read so many."""
        off = self._pace.factor * self._reading.factor(None)
        return self.costs.draft.reading_ms(tokens) * off

    # What was measured.

    def verified(self, size: int, rows: int, ms: float) -> None:
        """A step's time without drafting."""
        kind, usual = _kind(size, rows), self.model(size, rows)
        self._pace.observe(usual * self._verifying.factor(kind), ms)
        self._verifying.observe(kind, usual * self._pace.factor, ms)

    def drafted(self, members: int, drafted: Budget, ms: float, read: int | None) -> None:
        """What drafting for so many took, ``read`` tokens read before (None: none that count)."""
        usual = self.costs.draft.ms(members, drafted.nodes) * self._pace.factor
        kind = self._kind_of_draft(members, drafted)
        if read is None:
            self._drafting.observe(kind, usual, ms)
        else:
            reading = max(ms - usual * self._drafting.factor(kind), 1e-6)
            known = self.costs.draft.reading_ms(read) * self._pace.factor
            self._reading.observe(None, known, reading)

    def _kind_of_draft(self, members: int, drafted: Budget) -> tuple[int, Budget | None]:
        """Levels of chains take the same each, so chains of any length are off alike."""
        return members.bit_length(), None if self._chains else drafted


def _rounded(context: float) -> float:
    return 64.0 * round(context / 64)


def _kind(size: int, rows: int) -> tuple[int, int]:
    """Steps that are off alike: sequences by doublings, and rows for each by halves of them."""
    return size.bit_length(), round(2 * math.log2(rows / size)) if rows > size else -1
