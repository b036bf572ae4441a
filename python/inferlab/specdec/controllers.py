"""Controllers by name: how much to draft in the next step."""

from __future__ import annotations

from collections import deque
from typing import Any

from inferlab.config import MAX_DRAFT, MAX_TREE_NODES
from inferlab.specdec.control import Choice, Controller, Outlook, StepObservation
from inferlab.specdec.costs import CostModel
from inferlab.specdec.planner import CostController
from inferlab.specdec.tree import Budget
from inferlab.types import check

CONTROLLERS = ("fixed", "adaptive", "cost")


class FixedController(Controller):
    """Always the same K: all the nodes that the drafter has for so many levels."""

    def __init__(self, k: int = 4) -> None:
        check("k", k, 0 <= k <= MAX_DRAFT, f"an integer from 0 to {MAX_DRAFT}")
        self.max_k = k

    def choose(self, outlook: Outlook) -> Choice:
        return Choice(Budget(self.max_k, MAX_TREE_NODES))

    def describe(self, since: Any = None) -> dict[str, Any]:
        return {"controller": "fixed", "k": self.max_k}


class AdaptiveController(Controller):
    """Moves K by one towards a target acceptance rate.

    The rate is the share of offered levels that were accepted, over a sliding window of steps. K
    goes up while it is above the target, down while it is below, within [min_k, max_k].
    """

    WINDOW = 8

    def __init__(self, min_k: int = 1, max_k: int = 8, target_acceptance: float = 0.7) -> None:
        check("min_k", min_k, 0 <= min_k <= MAX_DRAFT, f"an integer from 0 to {MAX_DRAFT}")
        check("max_k", max_k, min_k <= max_k <= MAX_DRAFT, f"an integer from min_k to {MAX_DRAFT}")
        check("target_acceptance", target_acceptance, 0 <= target_acceptance <= 1, "in [0, 1]")
        self.min_k = min_k
        self.max_k = max_k
        self.target_acceptance = target_acceptance
        self.k = (min_k + max_k + 1) // 2
        self._recent: deque[tuple[int, int]] = deque(maxlen=self.WINDOW)

    def choose(self, outlook: Outlook) -> Choice:
        return Choice(Budget(self.k, MAX_TREE_NODES))

    def observe(self, step: StepObservation) -> None:
        offered = sum(step.depths)
        if not offered:
            return
        self._recent.append((sum(map(len, step.accepted)), offered))
        rate = sum(a for a, _ in self._recent) / sum(o for _, o in self._recent)
        if rate > self.target_acceptance:
            self.k = min(self.k + 1, self.max_k)
        elif rate < self.target_acceptance:
            self.k = max(self.k - 1, self.min_k)

    def describe(self, since: Any = None) -> dict[str, Any]:
        return {
            "controller": "adaptive",
            "k": self.k,
            "min_k": self.min_k,
            "max_k": self.max_k,
            "target_acceptance": self.target_acceptance,
        }


def make_controller(
    name: str,
    *,
    k: int = 4,
    min_k: int = 1,
    max_k: int = 8,
    target_acceptance: float = 0.7,
    costs: CostModel | None = None,
) -> Controller:
    """The controller ``name``: ``k`` for fixed, the bounds for adaptive, ``max_k`` and ``costs``
    for cost."""
    check("controller", name, name in CONTROLLERS, f"one of {', '.join(CONTROLLERS)}")
    if name == "fixed":
        return FixedController(k)
    if name == "adaptive":
        return AdaptiveController(min_k, max_k, target_acceptance)
    return CostController(max_k, costs)
