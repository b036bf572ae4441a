"""The controller that knows what steps cost: it drafts where that pays, at a bounded price."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from inferlab.config import MAX_DRAFT
from inferlab.specdec.acceptance import UNKNOWN
from inferlab.specdec.control import Choice, Controller, Outlook, StepObservation
from inferlab.specdec.costs import CostModel, DraftCosts, StepCosts
from inferlab.specdec.tree import NO_DRAFT, Budget, are_chains
from inferlab.specdec.verdict import Report
from inferlab.types import check

UNMEASURED = CostModel(StepCosts((1, 128), (1.0, 4.0)), DraftCosts(((1, ((0, 0.0), (64, 1.0))),)))
"""Where nothing could be measured: rows take a little more than none, and what steps really take
is learnt from them."""


class CostController(Controller):
    """Takes draft nodes while the tokens to be expected of them are worth their time.

    How it decides is said in ``csrc/planner/planner.h``, with the formulas in ``COSTS.md``: it is
    compiled, since a step of a small model takes no more than a millisecond.

    Args:
        max_k: levels to draft at most.
        costs: what steps take; None: nothing is known before the first.
    """

    def __init__(self, max_k: int = 8, costs: CostModel | None = None) -> None:
        whole = isinstance(max_k, int) and 0 <= max_k <= MAX_DRAFT
        check("max_k", max_k, whole, f"an integer from 0 to {MAX_DRAFT}")
        if costs is not None and not isinstance(costs, CostModel):
            raise TypeError(f"costs is {costs!r}; it must be a CostModel, or None")
        self.max_k = max_k
        self._report = Report()
        self._lock = threading.Lock()
        self.costs = UNMEASURED if costs is None else costs

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins anew."""
        return type(self), (self.max_k, None if self.costs is UNMEASURED else self.costs)

    @property
    def costs(self) -> CostModel:
        """What steps take; to be set before the first."""
        return self._costs

    @costs.setter
    def costs(self, costs: CostModel) -> None:
        self._costs = costs
        self._planner = costs.planner(measured=costs is not UNMEASURED)
        self._given: Sequence[Budget] = ()
        self._known = UNKNOWN
        self._rungs: list[Budget] = [NO_DRAFT]

    def choose(self, outlook: Outlook) -> Choice:
        with self._lock:  # engines of other drafters may ask meanwhile
            return self._choose(outlook)

    def _choose(self, outlook: Outlook) -> Choice:
        self._climb(outlook)
        rung, members, judged, steps, gives_up = self._planner.choose(
            outlook.requests,
            outlook.context,
            outlook.remaining,
            outlook.unread,
            outlook.able,
            outlook.waiting,
            outlook.joining,
            outlook.packs,
            outlook.written,
        )
        if rung == 0:
            return Choice(NO_DRAFT, steps=steps, gives_up=gives_up)
        return Choice(self._rungs[rung], members, self._planner if judged else None)

    def follows(self, tokens: int, outlook: Outlook) -> bool:
        with self._lock:
            self._climb(outlook)
            follows: bool = self._planner.follows(
                tokens,
                outlook.requests,
                outlook.context,
                outlook.remaining,
                outlook.waiting,
                outlook.joining,
                outlook.packs,
            )
        return follows

    def observe(self, step: StepObservation) -> None:
        plain_ms = self._planner.observe(
            step.batch_size,
            step.budget,
            step.step_ms,
            step.accepted,
            step.caught_up,
            step.rows,
            step.draft_ms,
            step.heard,
            step.came_true,
        )
        size = step.batch_size
        rows = step.rows or size * (1 + step.budget.nodes)
        self._report.count(-(-(rows - size) // size), size, step.step_ms, plain_ms)

    def rested(self, batch_size: int, steps_ms: Sequence[float], heard: bool) -> None:
        self._planner.rested(batch_size, steps_ms, heard)
        spent = sum(steps_ms)
        self._report.count(0, batch_size, spent, spent, len(steps_ms))

    def describe(self, since: Any = None) -> dict[str, Any]:
        report = self._report.since(since)
        return {
            "controller": "cost",
            "max_k": self.max_k,
            **report.describe(self._planner.promised, drafts=len(self._rungs) > 1),
        }

    def tally(self) -> Report:
        return self._report.since()

    def _climb(self, outlook: Outlook) -> None:
        """Takes up a drafter's ladder, cut to ``max_k`` levels, where it is another one."""
        ladder, known = outlook.ladder, outlook.known
        if ladder is self._given and known is self._known:
            return
        same = tuple(ladder) == tuple(self._given) and known == self._known
        self._given, self._known = ladder, known
        if same:
            return
        rungs = [Budget(min(b.levels, self.max_k), b.nodes) for b in ladder]
        rungs = [b for b in dict.fromkeys(rungs) if b.levels > 0]
        if are_chains(ladder):  # nodes are levels
            rungs = [b for b in rungs if b.nodes <= self.max_k]
        self._rungs = [NO_DRAFT, *rungs]
        self._planner.climb(self._rungs, *known)
