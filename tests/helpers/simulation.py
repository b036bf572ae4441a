"""A drafter and a target on a virtual clock, with costs and acceptance that can change."""

from __future__ import annotations

import random
from collections.abc import Sequence

from inferlab.specdec.acceptance import SURE, UNKNOWN, Known, kinds_of
from inferlab.specdec.control import Choice, Outlook, StepObservation
from inferlab.specdec.costs import CostModel, DraftCosts, DraftTime, StepCosts, StepTime
from inferlab.specdec.tree import NO_DRAFT, Budget

CHAIN = tuple(Budget(k, k) for k in range(1, 65))


class World:
    """Texts that are decoded with chains.

    Args:
        plain_ms: a forward of up to ``flat`` rows.
        row_ms: each row beyond.
        draft_ms: each level.
        acceptance: chance of each level; of all texts, or of each.
        sure: the drafter knows each token's chance, and asks a judge level by level.
        reading_ms: before the first draft for a text.
        examines: a drafter that is ``sure`` says, when it has read a text, how often it would have
            been right.
        noise: of every step's time, at most.
        behind: how many times as long a plain step takes right behind one that drafted.
    """

    def __init__(
        self,
        plain_ms: float = 10.0,
        row_ms: float = 0.1,
        draft_ms: float = 1.0,
        acceptance: float | Sequence[float] = 0.8,
        *,
        flat: int = 4,
        sure: bool = False,
        reading_ms: float = 0.0,
        examines: bool = False,
        noise: float = 0.1,
        behind: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.plain_ms, self.row_ms, self.draft_ms = plain_ms, row_ms, draft_ms
        self.acceptance = acceptance
        self.flat, self.sure, self.reading_ms, self.noise = flat, sure, reading_ms, noise
        self.behind, self._drafted = behind, False
        self.random = random.Random(seed)
        self.known = UNKNOWN
        if sure:
            self.known = Known(by_kind=SURE, asks=True, examines=examines)
        self.elapsed_ms = 0.0
        self.tokens = 0
        self.chosen: list[int] = []
        self.first = 0  # number of the next text
        self._asleep, self._asleep_with = 0, []  # steps that the controller is not asked about

    def verify_ms(self, rows: int) -> float:
        return self.plain_ms + self.row_ms * max(rows - self.flat, 0)

    def rate(self, k: int, size: int, acceptance: float | None = None) -> float:
        """Tokens per ms with always K levels."""
        chance = self._chance(0) if acceptance is None else acceptance
        tokens = size * sum(chance**i for i in range(k + 1))
        return tokens / (self.verify_ms(size * (1 + k)) + k * self.draft_ms)

    def best_rate(self, size: int, most: int = 8) -> float:
        return max(self.rate(k, size) for k in range(most + 1))

    def costs(self, wrong: float = 1.0) -> CostModel:
        """What measuring would find, off by a factor."""
        steps = [
            StepTime(size, nodes, context, wrong * self.verify_ms(size * nodes))
            for size in (1, 4, 16)
            for nodes in (1, 2, 4, 8, 16)
            for context in (32, 256)
        ]
        drafts = [
            DraftTime(size, n, wrong * n * self.draft_ms) for size in (1, 16) for n in (0, 1, 4, 8)
        ]
        reading = [(n * 32, wrong * n * self.reading_ms) for n in (1, 4, 16) if self.reading_ms]
        return CostModel(StepCosts.fit(steps), DraftCosts.of(drafts, reading))

    def run(self, controller, tokens: int, size: int = 1, waiting: bool = False) -> None:
        """New texts, all of so many tokens, until the last has ended; ``waiting``: others wait for
        their places."""
        numbers = list(range(self.first, self.first + size))
        self.first += size
        self._length = tokens
        left, unread = [tokens] * size, [32 if self.reading_ms else 0] * size
        while max(left) > 0:
            at = [i for i, n in enumerate(left) if n > 0]
            outlook = Outlook(
                CHAIN,
                [numbers[i] for i in at],
                32.0,
                [left[i] for i in at],
                [unread[i] for i in at],
                waiting=waiting,
                packs=True,
                known=self.known,
                written=[tokens - left[i] for i in at],
            )
            self._step(controller, outlook, at, left, unread)

    def _step(self, controller, outlook, at, left, unread) -> None:
        asleep = self._asleep_with == outlook.requests and self._asleep > 0
        choice = Choice(NO_DRAFT) if asleep else controller.choose(outlook)
        self._asleep = self._asleep - 1 if asleep else choice.steps - 1
        self._asleep_with = outlook.requests
        members = range(len(at)) if choice.members is None else choice.members
        levels = choice.budget.levels
        read = [i for i in members if levels and unread[at[i]]]
        if read and self.known.examines and not self._examined(choice, outlook, at, members, left):
            levels = 0
        chances = [self._token_chances(at[i], levels) for i in members]
        counts = [levels] * len(chances)
        if self.sure and levels:
            requests = [outlook.requests[i] for i in members]
            kinds = [kinds_of(_paths(of)) for of in chances]
            drafted = 1
            while drafted < levels and choice.judge.goes_on(
                requests, [k[drafted - 1] for k in kinds]
            ):
                drafted += 1
            levels = drafted
            counts = choice.judge.keep(requests, [k[:levels] for k in kinds])
        walks: list[list[int]] = [[] for _ in at]
        came_true: list[bool | None] = [None] * len(at)
        for i, of, count in zip(members, chances, counts, strict=True):
            while len(walks[i]) < count and self.random.random() < of[len(walks[i])]:
                walks[i].append(len(walks[i]) + 1)
            if count < levels:
                came_true[i] = len(walks[i]) == count and self.random.random() < of[count]
        rows = len(at) + sum(counts)
        factor = self.random.uniform(1 - self.noise, 1 + self.noise)
        draft_ms = factor * (levels * self.draft_ms + len(read) * self.reading_ms)
        slow = self.behind if self._drafted and not levels else 1.0
        self._drafted = levels > 0
        ms = factor * slow * self.verify_ms(rows) + draft_ms
        for i in read:
            unread[at[i]] = 0
        self.elapsed_ms += ms
        self.chosen.append(sum(counts))
        for i, walk in zip(at, walks, strict=True):
            self.tokens += min(1 + len(walk), left[i])
            left[i] -= 1 + len(walk)
        if asleep:
            controller.rested(len(at), [ms], False)
            return
        depths = [0] * len(at)
        for i, count in zip(members, counts, strict=True):
            depths[i] = count
        controller.observe(
            StepObservation(
                len(at), choice.budget, ms, depths, walks, bool(read), rows, draft_ms,
                levels > 0, came_true,
            )
        )  # fmt: skip

    def _examined(self, choice, outlook, at, members, left) -> bool:
        sure = [self._token_chances(at[i], min(self._length - left[at[i]], 16)) for i in members]
        right = [[self.random.random() < chance for chance in of] for of in sure]
        return choice.judge.examined([outlook.requests[i] for i in members], sure, right)

    def _chance(self, text: int) -> float:
        if isinstance(self.acceptance, (int, float)):
            return float(self.acceptance)
        return self.acceptance[text % len(self.acceptance)]

    def _token_chances(self, text: int, levels: int) -> list[float]:
        chance = self._chance(text)
        if not self.sure:
            return [chance] * levels
        # Some tokens are certain, others hopeless; on average they are as likely.
        return [0.98 if self.random.random() < chance else 0.05 for _ in range(levels)]


def _paths(chances: Sequence[float]) -> list[float]:
    paths = []
    path = 1.0
    for chance in chances:
        path *= chance
        paths.append(path)
    return paths
