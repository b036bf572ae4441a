"""What drafting promises: how far each budget gets a batch, and in what time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inferlab.specdec import stragglers
from inferlab.specdec.acceptance import Acceptance, Known
from inferlab.specdec.control import Outlook
from inferlab.specdec.ranks import Onward, Ranks
from inferlab.specdec.step_times import StepTimes
from inferlab.specdec.tree import Budget

SOME = 64
"""Tokens to come, where it is not said."""


class Rates(NamedTuple):
    """Of drafting for some of a batch, by rung.

    Attributes:
        times: ms of verifying, by rows.
        plain: ms of a step without drafts.
        drafting, ms: of drafting, and of the whole step.
        rates: tokens per ms, that bring the end as near as tokens of all sequences would.
        gains: plain steps that one is worth, beyond the first.
        pull: [B, rungs] what a token of each sequence is worth, relative to one for all.
        own: what it is worth to its sequence alone.
    """

    times: np.ndarray
    plain: float
    drafting: np.ndarray
    ms: np.ndarray
    rates: np.ndarray
    gains: np.ndarray
    pull: np.ndarray
    own: float


class Prospects:
    """Of one drafter.

    Args:
        rungs: its budgets, the first without drafts.
        known: what it says of its nodes.
        times: what steps take.
    """

    def __init__(self, rungs: Sequence[Budget], known: Known, times: StepTimes) -> None:
        self.nodes = np.array([b.nodes for b in rungs])
        self.acceptance = Acceptance(known.by_kind, known.evidence)
        self.ranks = Ranks(rungs[-1].nodes, known.by_rank, known.evidence)
        self.onward = Onward()
        self._times = times

    def rates(self, outlook: Outlook, members: Sequence[int]) -> Rates:
        """Drafting for ``members``, by place."""
        size, count, nodes = outlook.batch_size, len(members), self.nodes
        accepted, kept = self.ranks.sums
        by_rank = np.diff(accepted)
        gained, known = np.zeros((size, len(nodes))), [0.0] * size
        for place in members:
            request = outlook.requests[place]
            factor, known[place] = self.acceptance.factor(request), self.acceptance.known(request)
            chances = by_rank * factor / (1 + by_rank * (factor - 1))
            gained[place, 1:] = np.cumsum(chances)[nodes[1:] - 1]
        times = self._times.verify(size, outlook.context)
        own = self.own_share(outlook)
        to_go = stragglers.course(outlook.remaining or [SOME] * size, gained, known, own)
        gains = to_go.steps[0] / to_go.steps - 1
        rows = size + count * kept[nodes] if outlook.packs else size * (1 + nodes)
        drafting = self._times.draft(count)
        ms = times[np.minimum(np.ceil(rows).astype(int), len(times) - 1)] + drafting
        return Rates(
            times=times,
            plain=float(times[size]),
            drafting=drafting,
            ms=ms,
            rates=size * (1 + gains) / ms,
            gains=gains,
            pull=to_go.pull,
            own=own,
        )

    def own_share(self, outlook: Outlook) -> float:
        """Of a plain step's time, what it takes for single sequences; 1 where each token counts."""
        size = outlook.batch_size
        if size == 1 or outlook.waiting or len(outlook.remaining) != size:
            return 1.0
        all_ms, one_ms = self._times.model(size, size), self._times.model(1, 1)
        return min(max((all_ms - one_ms) / (size - 1), 0.0) * size / all_ms, 1.0)

    def sure(self, sequences: int) -> float:
        """How much of what is to be expected of a step is sure to come: the more is known of the
        drafter, and the more sequences there are to make up for each other's luck."""
        return self.acceptance.certainty * (1 - 1 / math.sqrt(max(sequences, 1)))
