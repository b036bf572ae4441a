"""What drafters say of their nodes, so that it can be calibrated: ``csrc/planner/acceptance.h``.

A drafter tells its nodes apart by kinds: how sure its model was of the path to a node, how long the
match was that an n-gram hangs on and how deep the node is, or just its place in the order of worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inferlab import _C

Acceptance, Ranks = _C.planner.Acceptance, _C.planner.Ranks


class Known(NamedTuple):
    """What a drafter says of its nodes before any was verified.

    Attributes:
        by_rank: chance of the node of each rank, from 1 on; what is missing is assumed.
        by_kind: chance of a node of each kind; empty: nodes are told apart by rank alone.
        evidence: observations that these chances are worth, 0 where they were not measured.
        asks: drafting takes next to no time, or the judge is asked before what does.
        looks_up: it does take next to no time: drafts are looked up. It also says what became of
            them, see ``Judge.followed``.
        examines: when it reads a text, it says how often it would have been right, see
            ``Judge.examined``.
    """

    by_rank: Sequence[float] = ()
    by_kind: Sequence[float] = ()
    evidence: float = 0.0
    asks: bool = False
    looks_up: bool = False
    examines: bool = False


UNKNOWN = Known()

WINDOW = 16
"""Of a text the last tokens that the target chose, at most so many, are examined."""


_BINS, _STEP, _LOWEST = _C.planner.KINDS, _C.planner.KIND_STEP, _C.planner.LOWEST_ODDS

SURE = tuple(1 / (1 + math.exp(-(_LOWEST + (i + 0.5) / _STEP))) for i in range(_BINS))
"""Chances of the kinds that `kinds_of` tells apart, if the drafter is right about itself."""


def sure_of(best: float, second: float) -> float:
    """How sure a draft is of a token, by the scores that it and its rival were drawn by."""
    # A single token that may be drawn has no rival: its gap is infinite. An invalid row is NaN.
    return 1 / (1 + math.exp(min(second - best, 50.0))) if best > second else 0.5


def kinds_of(chances: Sequence[float]) -> list[int]:
    """The kinds of nodes that their drafter gives these chances."""
    kinds: list[int] = _C.planner.kinds_of(chances)
    return kinds


def kinds_of_logs(logs: np.ndarray) -> np.ndarray:
    """The same of many nodes at once, told by the logs of their chances."""
    logs = np.minimum(logs, -1e-9)
    odds = logs - np.log(-np.expm1(logs))
    kinds: np.ndarray = ((odds - _LOWEST) * _STEP).clip(0, _BINS - 1).astype(np.int64)
    return kinds
