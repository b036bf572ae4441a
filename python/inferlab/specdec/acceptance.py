"""How likely draft nodes are to be accepted: what drafters know of them, calibrated. No torch.

A drafter tells its nodes apart by kinds: how sure its model was of the path to a node, how long the
match was that an n-gram hangs on and how deep the node is, or just its place in the order of worth.
Each kind has a counter, so it does not matter how the drafter's own numbers are scaled:

    chance(kind) = (accepted + WEIGHT prior trust) / (offered + WEIGHT)

* accepted, offered: nodes of that kind that the walks went through, and all; both forgetting;
* prior: what the drafter says of the kind before anything was seen;
* trust: nodes of all kinds that were accepted, relative to what the priors had promised.

A sequence's own chances have the odds of these, times the ratio of what was accepted of its nodes
to what was expected of them, shrunk towards 1 where there is little evidence. A step's nodes stand
or fall together, so they count for no more than one that was to be expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

MOST = 0.99
"""No chance is above it."""


class Known(NamedTuple):
    """What a drafter says of its nodes before any was verified.

    Attributes:
        by_rank: chance of the node of each rank, from 1 on; what is missing is assumed.
        by_kind: chance of a node of each kind; empty: nodes are told apart by rank alone.
        evidence: observations that these chances are worth, 0 where they were not measured.
        asks: drafting takes next to no time, or the judge is asked before what does.
    """

    by_rank: Sequence[float] = ()
    by_kind: Sequence[float] = ()
    evidence: float = 0.0
    asks: bool = False


UNKNOWN = Known()


class Acceptance:
    """Chances of a drafter's nodes.

    Args:
        priors: of each kind, the chance before anything was seen.
        evidence: observations that the priors are worth.
    """

    FORGET = 0.98  # weight of what was known, per step
    WEIGHT = 6.0  # of a kind's prior, in nodes
    TRUST = 4.0  # of the priors all together, in accepted nodes
    OWN = 6.0  # of the chances of all sequences against one's own, in accepted nodes
    OWN_FORGET = 0.9

    def __init__(self, priors: Sequence[float], evidence: float = 0.0) -> None:
        self._priors = [float(prior) for prior in priors]
        self._accepted = [0.0] * len(priors)
        self._offered = [0.0] * len(priors)
        self._weight = max(self.WEIGHT, evidence)
        self._promised = self._kept = 0.0
        self._own: dict[int, tuple[float, float]] = {}  # by request: accepted, expected
        self._unit = 1.0  # weight of an observation now: instead of making the old ones lighter
        self._chances: list[float] | None = None
        self.observations = evidence
        """Sequences whose drafts were verified, forgetting."""

    @property
    def certainty(self) -> float:
        """In [0, 1): how much of the chances is observation."""
        return self.observations / (self.observations + 8.0)

    @property
    def chances(self) -> list[float]:
        """Of each kind, of a sequence like all others."""
        if self._chances is None:
            unit, weight = self._unit, self._weight
            trust = (self._kept + self.TRUST * unit) / (self._promised + self.TRUST * unit)
            self._chances = [
                min((found + min(prior * trust, MOST) * weight * unit) / (of + weight * unit), MOST)
                for prior, found, of in zip(
                    self._priors, self._accepted, self._offered, strict=True
                )
            ]
        return self._chances

    def factor(self, request_id: int) -> float:
        """How much larger the odds of a sequence's nodes are than their kinds say."""
        accepted, expected = self._own.get(request_id, (0.0, 0.0))
        return (accepted + self.OWN) / (expected + self.OWN)

    def known(self, request_id: int) -> float:
        """In [0, 1), how far a sequence's `factor` is known: so much less its steps tell of
        others."""
        _, expected = self._own.get(request_id, (0.0, 0.0))
        return expected / (expected + self.OWN)

    def chance(self, request_id: int, kind: int) -> float:
        """Of one of a sequence's nodes."""
        chance, factor = self.chances[kind], self.factor(request_id)
        return min(chance * factor / (1 + chance * (factor - 1)), MOST)

    def of(self, request_id: int, kinds: Sequence[int]) -> list[float]:
        """Chances of a sequence's nodes, given in the order of worth: falling."""
        factor = self.factor(request_id)
        own = [min(c * factor / (1 + c * (factor - 1)), MOST) for c in self.chances]
        return list(accumulate([own[kind] for kind in kinds], min))

    def count(self, verified: float) -> None:
        """A step in which drafts of so many sequences were verified."""
        self.observations = self.observations * self.FORGET + verified

    def learn(
        self,
        requests: Sequence[int],
        kinds: Sequence[Sequence[int]],
        accepted: Sequence[Sequence[int]],
    ) -> None:
        """A step: of each request the kinds of the nodes that were verified, by rank, and which
        ranks, from 1 on, its walk went through."""
        chances = self.chances
        verified = 0.0
        for request_id, of_nodes, ranks in zip(requests, kinds, accepted, strict=True):
            if not of_nodes:
                continue
            news = 1 - self.known(request_id)
            own, expected = self._own.pop(request_id, (0.0, 0.0))
            unit = news * self._unit
            verified += news
            for kind in of_nodes:
                self._offered[kind] += unit
            for rank in ranks:
                if rank <= len(of_nodes):
                    self._accepted[of_nodes[rank - 1]] += unit
            self._promised += unit * sum([self._priors[k] for k in of_nodes])
            self._kept += unit * len(ranks)
            in_step = sum([chances[k] for k in of_nodes])
            weight = 1 / max(in_step, 1.0)
            self._own[request_id] = (
                own * self.OWN_FORGET + weight * len(ranks),
                expected * self.OWN_FORGET + weight * in_step,
            )
        self.count(verified)
        self._unit /= self.FORGET ** (verified / max(len(requests), 1))
        if self._unit > 1e9:
            self._accepted = [value / self._unit for value in self._accepted]
            self._offered = [value / self._unit for value in self._offered]
            self._promised /= self._unit
            self._kept /= self._unit
            self._unit = 1.0
        while len(self._own) > 4096:
            self._own.pop(next(iter(self._own)))
        self._chances = None


_BINS, _STEP, _LOWEST = 12, 1.2, -4.0  # of log odds

SURE = tuple(1 / (1 + math.exp(-(_LOWEST + (i + 0.5) / _STEP))) for i in range(_BINS))
"""Chances of the kinds that `kinds_of` tells apart, if the drafter is right about itself."""


def kinds_of(chances: Sequence[float]) -> list[int]:
    """The kinds of nodes that their drafter gives these chances."""
    kinds = []
    for chance in chances:
        odds = math.log(max(chance, 1e-9) / max(1 - chance, 1e-9))
        kinds.append(min(max(int((odds - _LOWEST) * _STEP), 0), _BINS - 1))
    return kinds


def kinds_of_logs(logs: np.ndarray) -> np.ndarray:
    """The same of many nodes at once, told by the logs of their chances."""
    logs = np.minimum(logs, -1e-9)
    odds = logs - np.log(-np.expm1(logs))
    kinds: np.ndarray = ((odds - _LOWEST) * _STEP).clip(0, _BINS - 1).astype(np.int64)
    return kinds
