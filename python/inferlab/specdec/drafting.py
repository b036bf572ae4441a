"""A step that drafts: what was decided for it, and what its drafts are worth meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from inferlab.specdec.control import Outlook
from inferlab.specdec.padding import rows_run
from inferlab.specdec.prospects import Prospects


class Plan(NamedTuple):
    """What was decided for some steps.

    Attributes:
        members: for whom is drafted, by place.
        rung: of the ladder, at most.
        times: ms of verifying, by rows.
        drafting: ms, by rung.
        plain: ms of a step without drafts.
        price: tokens per ms.
        worth: of a token of each sequence, relative to one for all.
        worth_of: of the n-th token that a step brings each member, n from 0 on.
        sure: ms that are sure to be saved for each accepted token to be expected.
        loss: ms, if only what is sure comes.
        reading: tokens that the drafter reads first.
        tries: to learn, not to gain.
        asked: drafting is all but free: what it finds decides.
    """

    members: list[int]
    rung: int
    times: list[float]
    drafting: list[float]
    plain: float
    price: float
    worth: list[float]
    worth_of: list[list[float]]
    sure: float
    loss: float
    reading: int
    tries: bool
    asked: bool

    def verifying(self, rows: int) -> float:
        """Ms."""
        return self.times[min(rows, len(self.times) - 1)]


class Drafting:
    """The step under way.

    Args:
        stake: ms that it may lose.
    """

    def __init__(self, plan: Plan, outlook: Outlook, prospects: Prospects, stake: float) -> None:
        self.plan = plan
        self.outlook = outlook
        self.level = 0  # drafted so far
        self.value = 0.0  # tokens that the drafts are worth, less what verifying them costs
        self.kinds: list[list[int]] | None = None  # of the nodes that are verified
        self._prospects = prospects
        self._stake = stake
        self._left = stake - plan.loss
        self._above = 0.0  # what the last level's tokens would be worth if they were the next's

    def goes_on(self, requests: Sequence[int], kinds: Sequence[int]) -> bool:
        """See `Judge`."""
        plan = self.plan
        level = self.level = self.level + 1
        if plan.tries or level + 1 >= len(plan.drafting):
            return False
        chance, onward = self._prospects.acceptance.chance, self._prospects.onward
        chances = [chance(r, kind) for r, kind in zip(requests, kinds, strict=True)]
        if level > 1:
            onward.observe(self._above, sum(map(mul, chances, plan.worth_of[level])))
        self._above = sum(map(mul, chances, plan.worth_of[level + 1]))
        hope = self._above * onward.share
        # Another level, and at least a row where it is worth something.
        size = self.outlook.batch_size
        rows = size + len(requests) * level
        deeper = rows_run(size * (2 + level), rows + 1, self.outlook.packs)
        more = plan.drafting[level + 1] - plan.drafting[level]
        more += plan.verifying(deeper) - plan.verifying(rows)
        self._left -= more - plan.sure * hope
        return hope > plan.price * more and self._left >= 0

    def keep(self, requests: Sequence[int], kinds: Sequence[Sequence[int]]) -> list[int]:
        """See `Judge`."""
        acceptance = self._prospects.acceptance
        chances = [acceptance.of(r, k) for r, k in zip(requests, kinds, strict=True)]
        counts = [len(c) for c in chances] if self.plan.tries else self._worth_verifying(chances)
        self.kinds = [list(k[:n]) for k, n in zip(kinds, counts, strict=True)]
        return counts

    def _worth_verifying(self, chances: list[list[float]]) -> list[int]:
        """How many nodes of each sequence: the likeliest of all, as many as pay."""
        plan, size, packs = self.plan, self.outlook.batch_size, self.outlook.packs
        # A chain: its n-th node is the n-th token that the step brings.
        most = max(map(len, chances), default=0)
        worth = plan.worth_of[1:]
        chances = [[c * worth[n][s] for n, c in enumerate(of)] for s, of in enumerate(chances)]
        alike = list(accumulate([sum(c[n] for c in chances if n < len(c)) for n in range(most)]))
        found = sorted([(-c, n, s) for s, of in enumerate(chances) for n, c in enumerate(of)])
        best, ragged, brought, depth = 0, True, 0.0, 0
        for count, (lost, n, _) in enumerate(found, start=1):
            depth = max(depth, n + 1)
            brought -= lost
            padded = size * (1 + depth)
            rows = rows_run(padded, size + count, packs)
            # Where padding is computed anyway, nodes take its place.
            gained = alike[depth - 1] if rows == padded else brought
            spent = plan.verifying(rows) - plan.plain
            value = gained - plan.price * spent
            covered = not plan.asked or spent - plan.sure * gained <= self._stake
            if value > self.value and covered:
                best, ragged, self.value = count, rows < padded, value
        counts = [0] * len(chances)
        for _, n, s in found[:best]:
            counts[s] = n + 1
        if not ragged:
            counts = [min(max(counts), len(c)) for c in chances]
        return counts
