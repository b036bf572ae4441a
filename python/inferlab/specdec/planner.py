"""The controller that knows what steps cost: it drafts where that pays, at a bounded price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from inferlab.config import MAX_DRAFT
from inferlab.specdec import stragglers
from inferlab.specdec.acceptance import Acceptance
from inferlab.specdec.control import Choice, Controller, Outlook, StepObservation
from inferlab.specdec.costs import CostModel, DraftCosts, StepCosts
from inferlab.specdec.ranks import Onward, Ranks
from inferlab.specdec.step_times import StepTimes
from inferlab.specdec.tree import NO_DRAFT, Budget
from inferlab.specdec.verdict import Report
from inferlab.types import check

UNMEASURED = CostModel(StepCosts((1, 128), (1.0, 4.0)), DraftCosts(((1, ((0, 0.0), (64, 1.0))),)))
"""Where nothing could be measured: rows take a little more than none, and what steps really take
is learnt from them."""

NOT_DRAFTED = Choice(NO_DRAFT)
ASLEEP = Choice(NO_DRAFT, asleep=True)


class CostController(Controller):
    """Takes draft nodes while the tokens to be expected of them are worth their time.

    The price of a millisecond is the rate of the best budget, in tokens per ms:

        rate(n nodes) = (B + members * sum of chances of ranks <= n) / (draft + verify ms)

    with the times of the cost model, corrected by how far steps were off lately, and with chances
    by rank, what the judge left out included. At that price a draft model goes on to the next level
    while what it may bring to all sequences is worth its forward, and of the nodes of all sequences
    those are verified, likeliest first, whose chance is worth the rows they add.

    What is not drafted teaches nothing, and what was promised may not come. So there is an account
    of the time that was lost against decoding plainly: it begins with ``FIRST`` plain steps,
    ``SHARE`` of all time is added, and what drafts gained, up to ``SAVINGS`` plain steps. A step
    whose drafts are not sure to pay is taken only while the account covers what it would lose if
    only the certain part of its gain came. Texts that the drafter would first have to read are
    weighed by the tokens still to come, and count as such a loss.

    Where drafting pays, a plain step is timed at first and now and then.

    Args:
        max_k: levels to draft at most.
        costs: what steps take; None: nothing is known before the first.
    """

    FIRST, SHARE, SAVINGS = 0.6, 0.006, 4.0
    WORST = 1.5  # plain steps that one of the first steps may lose
    LUCK = 2.5  # plain steps that the account may be short of, where what is certain pays
    MARGIN = 1.02  # what another rung must promise before it is taken
    PRUDENCE = 1.05  # what drafts must promise over their price: some of it is not in the model
    READY = 16  # tokens that a drafter catches up with in a usual step
    PLAIN_FIRST = 8  # drafted steps until a second plain one is timed; then four times as many
    LOOK_EVERY = 4  # steps: deciding takes as long as some ops of a small model
    LEARN_AT_ONCE = 8  # steps that drafted, at first
    SURPRISE = 1.5  # times what was planned: it is looked at again
    SLEEP = 32  # steps without drafts that are decided on at once, at most
    WAKING = 3  # the last of them tell how fast the machine is

    def __init__(self, max_k: int = 8, costs: CostModel | None = None) -> None:
        check("max_k", max_k, 0 <= max_k <= MAX_DRAFT, f"an integer from 0 to {MAX_DRAFT}")
        self.max_k = max_k
        self._times = StepTimes(UNMEASURED if costs is None else costs)
        self._account = 0.0  # ms
        self._newest = -1  # the last request that was seen
        self._timed: dict[int, _Timed] = {}  # by doublings of the batch size
        self._asleep = 0  # steps without a look
        self._looked_at = 0  # the batch size that was looked at
        self._given: Sequence[Budget] = ()
        self._rungs: list[Budget] = [NO_DRAFT]
        self._last: dict[int, int] = {}  # by batch size, the rung taken last
        self._plan: _Plan | None = None
        self._steps_left = 0  # until it is looked at again
        self._now: _Drafting | None = None
        self._pending: list[tuple[_Drafting | None, StepObservation, float]] = []
        self._learnt = 0  # steps that drafted
        self._report = Report()

    @property
    def costs(self) -> CostModel:
        """What steps take; to be set before the first."""
        return self._times.costs

    @costs.setter
    def costs(self, costs: CostModel) -> None:
        self._times = StepTimes(costs)

    # What is asked before and while drafting.

    def choose(self, outlook: Outlook) -> Choice:
        if outlook.ladder is not self._given:
            self._climb(outlook)
        if len(self._rungs) == 1:
            return NOT_DRAFTED
        size = outlook.batch_size
        same = size == self._looked_at and max(outlook.requests) <= self._newest
        if same and self._asleep > 0:
            self._asleep -= 1
            return ASLEEP
        ready = not outlook.unread or max(outlook.unread) <= self.READY
        plan = self._plan
        if not (same and ready and plan is not None and self._steps_left > 0):
            plan = self._plan = self._look(outlook)
            self._looked_at, self._steps_left = size, self.LOOK_EVERY
        self._steps_left -= 1
        if plan is None or not self._covers(plan.loss, plan.plain):
            self._plan = None
            return ASLEEP if self._asleep > 0 else NOT_DRAFTED
        timed = self._timed.setdefault(size.bit_length(), _Timed())
        timed.steps += 1
        if timed.steps >= timed.due:
            timed.due = min(max(4 * timed.due, self.PLAIN_FIRST), timed.steps + 256)
            return ASLEEP  # as without a drafter
        own = self._own_share(outlook)
        worth = stragglers.worth(outlook.remaining or [1] * size, own)
        worth = [plan.useful * value for value in worth]
        account = max(self._account, 0.0)
        self._now = _Drafting(
            plan, outlook, worth, plan.useful * own, account - plan.loss, account - plan.worst
        )
        everyone = len(plan.members) == size
        # Grown trees that were cut, or merely watched, were slower: see COSTS.md.
        judge = self if outlook.known.by_kind and outlook.known.asks else None
        return Choice(self._rungs[plan.rung], None if everyone else plan.members, judge)

    def _look(self, outlook: Outlook) -> _Plan | None:
        """What is best as far as is known; None: not to draft."""
        self._digest()
        size = outlook.batch_size
        times = self._times.verify(size, outlook.context)
        plain = float(times[size])
        self._account = min(self._account, self.SAVINGS * plain)
        self._admit(outlook, plain)
        members, reading = self._members(outlook, times)
        rates, ms, gains = self._rates(outlook, times, members)
        best = int(rates.argmax())
        last = self._last.get(size, 0)
        if rates[best] < rates[last] * self.MARGIN:
            best = last
        if rates[best] < rates[0] * self.PRUDENCE:
            best = 0
        self._last[size] = best
        self._report.promise(float(rates[best] / rates[0]))
        tries = best == 0
        if tries:
            best = self._smallest_worth_trying(plain, ms)
        if outlook.known.asks and best > 0:
            best = 1  # the rest is asked for
        best, loss, worst = self._covered(best, plain, ms, gains, reading)
        if best == 0 or not members:
            if tries or not members:
                # Until the account might cover a try; it need not be looked at before.
                least = float(ms[1] - plain) - self._account if members else plain
                self._asleep = min(int(least / (self.SHARE * plain)), self.SLEEP)
            return None
        if outlook.known.asks:
            best = len(self._rungs) - 1
        price = max(float(rates.max()), size / plain) * self.PRUDENCE
        sure = self._acceptance.certainty * plain / size
        drafting = self._times.draft(len(members)).tolist()
        brought = float(self._ranks.sums[0][self._nodes[best]]) * len(members) / size
        useful = min(float(gains[best]) / brought, 1.0) if brought > 0 else 1.0
        return _Plan(
            members,
            best,
            times.tolist(),
            drafting,
            plain,
            price,
            useful,
            stragglers.lead(len(self._rungs) - 1, brought),
            sure,
            tries,
            reading,
            loss,
            worst,
        )

    def follows(self, tokens: int, outlook: Outlook) -> bool:
        if outlook.ladder is not self._given:
            self._climb(outlook)
        if len(self._rungs) == 1:
            return False
        self._digest()
        size = outlook.batch_size
        times = self._times.verify(size, outlook.context)
        plain = float(times[size])
        self._admit(outlook, plain)
        rates, ms, gains = self._rates(outlook, times, range(size))
        best = int(rates.argmax())
        cost = self._times.read(tokens)
        saved = plain * (1 + gains[best]) - ms[best]
        steps = sum(outlook.remaining) / (size * (1 + gains[best]))
        sure = self._acceptance.certainty
        if saved * steps <= cost:
            # Nothing to be gained, as far as is known: tried where it is all but free.
            return cost + ms[1] - plain <= self._account and sure < 0.5
        return cost * (1 - sure) <= self._account

    def goes_on(self, requests: Sequence[int], kinds: Sequence[int]) -> bool:
        now = self._now
        if now is None:
            return True
        plan = now.plan
        level = now.level = now.level + 1
        if plan.tries or level + 1 >= len(self._rungs):
            return False
        chance, worth = self._acceptance.chance, now.worth(level + 1)
        there = sum(
            [
                chance(request, kind) * value
                for request, kind, value in zip(requests, kinds, worth, strict=True)
            ]
        )
        if level > 1:
            self._onward.observe(now.above, there)
        now.above = there
        hope = there * self._onward.share
        # Another level, and at least a row where it is worth something.
        more = plan.drafting[level + 1] - plan.drafting[level]
        rows = now.outlook.batch_size + len(requests) * level
        if rows + 1 < len(plan.times):
            more += plan.times[rows + 1] - plan.times[rows]
        now.left -= more - plan.sure * hope
        now.room -= more
        return hope > plan.price * more and now.left >= 0 and now.room >= 0

    def keep(self, requests: Sequence[int], kinds: Sequence[Sequence[int]]) -> list[int]:
        now = self._now
        if now is None:
            return [len(of_nodes) for of_nodes in kinds]
        chances = [self._acceptance.of(r, k) for r, k in zip(requests, kinds, strict=True)]
        counts = (
            [len(c) for c in chances] if now.plan.tries else self._worth_verifying(now, chances)
        )
        now.kinds = [list(k[:n]) for k, n in zip(kinds, counts, strict=True)]
        return counts

    def _worth_verifying(self, now: _Drafting, chances: list[list[float]]) -> list[int]:
        """How many nodes of each sequence: the likeliest of all, as many as pay."""
        plan, size, packs = now.plan, now.outlook.batch_size, now.outlook.packs
        # A chain: its n-th node is the n-th token that the step brings.
        worth = [now.worth(n) for n in range(1, 1 + max(map(len, chances), default=0))]
        chances = [[c * worth[n][s] for n, c in enumerate(of)] for s, of in enumerate(chances)]
        if packs:
            found = sorted([(c, s) for s, of in enumerate(chances) for c in of], reverse=True)
            gains, rows = [c for c, _ in found], 1
        else:
            most = max(map(len, chances), default=0)
            gains, rows = [sum(c[n] for c in chances if n < len(c)) for n in range(most)], size
        times, last, plain = plan.times, len(plan.times) - 1, plan.plain
        account = max(self._account, 0.0) + 1e-9
        best, best_value, brought = 0, 0.0, 0.0
        for n, gain in enumerate(gains, start=1):
            brought += gain
            spent = times[min(size + n * rows, last)] - plain
            value = brought - plan.price * spent
            if value > best_value and spent <= account + plan.sure * brought:
                best, best_value = n, value
        if not packs:
            return [min(best, len(c)) for c in chances]
        counts = [0] * len(chances)
        for _, sequence in found[:best]:
            counts[sequence] += 1
        return counts

    def observe(self, step: StepObservation) -> None:
        now, self._now = self._now, None
        if step.budget == NO_DRAFT:
            now = None  # also near the end of all texts, whatever was chosen
        if len(self._rungs) == 1:
            return
        if self._asleep > self.WAKING and now is None:
            self._report.count(step, step.step_ms)
            self._account += self.SHARE * step.step_ms
            return
        tokens = 1.0  # of plain steps that would have got as far
        at_once = self._learnt < self.LEARN_AT_ONCE
        self._account += self.SHARE * step.step_ms
        if now is not None:
            plan = now.plan
            gained = [1 + len(ranks) for ranks in step.accepted]
            own = self._own_share(now.outlook)
            tokens = stragglers.progress(now.outlook.remaining or gained, gained, own)
            tokens = 1 + plan.useful * (tokens - 1)
            drafted = step.draft_ms if step.caught_up else plan.drafting[now.level or plan.rung]
            took = plan.times[min(_rows(step), len(plan.times) - 1)] + drafted
            if step.step_ms > self.SURPRISE * took:
                took, at_once, self._plan = step.step_ms, True, None
            self._account += tokens * plan.plain - took
        self._pending.append((now, step, tokens))
        if at_once or len(self._pending) >= self.LOOK_EVERY:
            self._digest()

    def _digest(self) -> None:
        """Learns from the steps since the last time: several at once are the cheaper."""
        pending, self._pending = self._pending, []
        for now, step, tokens in pending:
            size = step.batch_size
            verify_ms = step.step_ms - step.draft_ms
            if now is None and step.heard:
                verify_ms -= self.costs.draft.ms(size, 0)  # what keeping up takes
            self._times.verified(size, _rows(step), verify_ms)
            if now is not None:
                self._learn(now, step)
            self._report.count(step, tokens * self._times.step(size, size))

    def _learn(self, now: _Drafting, step: StepObservation) -> None:
        """From a step that drafted."""
        self._learnt += 1
        members, rung = now.plan.members, now.plan.rung
        accepted = [step.accepted[i] for i in members]
        if now.kinds is not None:
            requests = [now.outlook.requests[i] for i in members]
            self._acceptance.learn(requests, now.kinds, accepted)
        else:
            self._acceptance.count(len(members))
        if step.budget == self._rungs[rung]:
            kept = None if now.kinds is None else [len(k) for k in now.kinds]
            self._ranks.learn(step.budget.nodes, accepted, kept)
        # Where it was asked, so many levels were drafted.
        drafted = self._rungs[now.level] if now.level > 0 else step.budget
        read = now.plan.reading if step.caught_up else None
        self._times.drafted(len(members), drafted, step.draft_ms, read)

    def describe(self) -> dict[str, Any]:
        self._digest()
        return {
            "controller": "cost",
            "max_k": self.max_k,
            **self._report.describe(),
        }

    # How a choice is made.

    def _climb(self, outlook: Outlook) -> None:
        """Takes up a drafter's ladder, cut to ``max_k`` levels."""
        self._digest()
        self._given = ladder = outlook.ladder
        rungs = [Budget(min(b.levels, self.max_k), b.nodes) for b in ladder]
        rungs = [b for b in dict.fromkeys(rungs) if b.levels > 0]
        if all(b.levels == b.nodes for b in ladder):  # a chain: nodes are levels
            rungs = [b for b in rungs if b.nodes <= self.max_k]
        self._rungs = [NO_DRAFT, *rungs]
        self._nodes = np.array([b.nodes for b in self._rungs])
        self._times.climb(self._rungs)
        self._last.clear()
        self._plan = None
        known = outlook.known
        self._acceptance = Acceptance(known.by_kind, known.evidence)
        self._ranks = Ranks(self._rungs[-1].nodes, known.by_rank)
        self._onward = Onward()

    def _admit(self, outlook: Outlook, plain: float) -> None:
        """New sequences are new luck: they bring their part of an account of their own."""
        new = sum(request > self._newest for request in outlook.requests)
        if new:
            self._newest = max(outlook.requests)
            self._account = max(self._account, self.FIRST * plain * new / outlook.batch_size)

    def _members(self, outlook: Outlook, times: np.ndarray) -> tuple[list[int], int]:
        """For whom to draft, by place, and how many tokens must be read for it."""
        size, unread = outlook.batch_size, outlook.unread
        able = range(size) if outlook.able is None else outlook.able
        if not unread or max(unread) <= self.READY:
            return list(able), 0
        members = [i for i in able if unread[i] <= self.READY]
        waiting = sorted((unread[i], i) for i in able if unread[i] > self.READY)
        plain, account = float(times[size]), self._account
        rates, ms, gains = self._rates(outlook, times, range(size))
        best = int(rates.argmax())
        saved = (plain * (1 + gains[best]) - ms[best]) / size
        sure, reading = self._acceptance.certainty, 0
        together = self._own_share(outlook) < 1
        if together and sure > 0.5:
            account += self.WORST * plain
        joined: list[int] = []
        for tokens, i in waiting:
            cost = self._times.read(reading + tokens) - self._times.read(reading)
            benefit = saved * outlook.remaining[i] / (1 + gains[best])
            if benefit < 1.2 * cost and (members or joined or sure > 0.5):
                break
            account -= cost * (1 - sure)
            if account < 0:
                break
            joined.append(i)
            reading += tokens
        if together and len(joined) < len(waiting):
            # Who is left behind decides how many steps there are: one at most, to learn.
            joined = joined[:1] if not members and sure <= 0.5 else []
            reading = sum(unread[i] for i in joined)
        return sorted([*members, *joined]), reading

    def _rates(
        self, outlook: Outlook, times: np.ndarray, members: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each rung, for some of the batch, by place: tokens per ms, ms, and how many plain
        steps one is worth beyond the first."""
        size, count = outlook.batch_size, len(members)
        accepted, kept = self._ranks.sums
        own = self._own_share(outlook)
        remaining = outlook.remaining or [1] * size
        accepted = accepted[self._nodes]
        gains = stragglers.expected_progress(remaining, members, accepted, own) - 1
        rows = size + count * kept[self._nodes] if outlook.packs else size * (1 + self._nodes)
        verify = times[np.minimum(np.ceil(rows).astype(int), len(times) - 1)]
        ms = verify + self._times.draft(count)
        return size * (1 + gains) / ms, ms, gains

    def _smallest_worth_trying(self, plain: float, ms: np.ndarray) -> int:
        """The first rung that would pay if every level were accepted."""
        for rung in range(1, len(self._rungs)):
            if (1 + self._rungs[rung].levels) * plain > ms[rung]:
                return rung
        return 0

    def _covered(
        self, rung: int, plain: float, ms: np.ndarray, gains: np.ndarray, reading: int
    ) -> tuple[int, float, float]:
        """The largest rung up to this one whose possible losses the account covers, and the losses:
        where only what is certain comes, and where nothing comes, less the ``WORST`` plain steps
        that one of the first steps may lose so."""
        sure = self._acceptance.certainty
        read = self._times.read(reading)
        while rung > 0:
            loss = float(ms[rung] - plain * (1 + sure * gains[rung])) + (1 - sure) * read
            worst = -math.inf
            if self._learnt < self.LEARN_AT_ONCE:
                worst = float(ms[rung]) - plain + read - self.WORST * plain
            if self._covers(loss, plain) and worst <= max(self._account, 0.0):
                return rung, loss, worst
            rung -= 1
        return 0, 0.0, 0.0

    def _covers(self, loss: float, plain: float) -> bool:
        """Whether the account covers a possible loss, in ms."""
        luck = self.LUCK * plain / math.sqrt(max(self._looked_at, 1))
        return loss <= (self._account if loss > 0 else self._account + luck)

    def _own_share(self, outlook: Outlook) -> float:
        """Of a plain step's time, what it takes for single sequences; 1 where each token counts."""
        size = outlook.batch_size
        if size == 1 or outlook.waiting or len(outlook.remaining) != size:
            return 1.0
        all_ms, one_ms = self._times.model(size, size), self._times.model(1, 1)
        return min(max((all_ms - one_ms) / (size - 1), 0.0) * size / all_ms, 1.0)


def _rows(step: StepObservation) -> int:
    """Of the target's forward; all that the budget allows where it is not told."""
    return step.rows or step.batch_size * (1 + step.budget.nodes)


class _Plan(NamedTuple):
    """What was decided for some steps."""

    members: list[int]
    rung: int
    times: list[float]  # ms of verifying, by rows
    drafting: list[float]  # ms by rung
    plain: float  # ms
    price: float  # tokens per ms
    useful: float  # of the tokens that drafts bring: the rest waits for those that are behind
    lead: list[float]  # weight of what the n-th token of a step is worth to all
    sure: float  # ms that an accepted token saves, times how certain it is to come
    tries: bool  # to learn, not to gain
    reading: int  # tokens
    loss: float  # ms, if only what is certain comes
    worst: float  # ms that may not come back, beyond what may be lost at first


class _Drafting:
    """The step under way."""

    def __init__(
        self,
        plan: _Plan,
        outlook: Outlook,
        worth: list[float],
        own: float,
        left: float,
        room: float,
    ) -> None:
        self.plan = plan
        self.outlook = outlook
        self._own = own  # what a token is worth to its own sequence
        self._shared = [worth[i] - own for i in plan.members]  # and to all of them
        self.left = left  # of the account, if only what is certain comes
        self.room = room  # and if nothing comes
        self.level = 0  # drafted so far
        self.above = 0.0  # tokens to be expected of the last level
        self.kinds: list[list[int]] | None = None  # of the nodes that are verified

    def worth(self, nth: int) -> list[float]:
        """Of the n-th token that the step brings each member, n from 1 on."""
        lead = self.plan.lead[min(nth, len(self.plan.lead) - 1)]
        return [self._own + lead * shared for shared in self._shared]


@dataclass
class _Timed:
    """When the next plain step is due, in steps that were to draft."""

    steps: int = 0
    due: int = 1
