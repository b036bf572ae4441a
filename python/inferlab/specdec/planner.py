"""The controller that knows what steps cost: it drafts where that pays, at a bounded price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferlab.config import MAX_DRAFT
from inferlab.specdec import stragglers
from inferlab.specdec.account import Account
from inferlab.specdec.control import Choice, Controller, Outlook, StepObservation
from inferlab.specdec.costs import CostModel, DraftCosts, StepCosts
from inferlab.specdec.drafting import Drafting, Plan
from inferlab.specdec.prospects import SOME, Prospects, Rates
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

    The price of a millisecond is the rate of the best budget, in tokens per ms, plain decoding
    among them: how far it gets the batch (`Prospects`), over the time of the cost model, corrected
    by how far steps were off lately. At that price a draft model goes on to the next level while
    what it may bring to all sequences is worth its forward, and of the nodes of all sequences those
    are verified, likeliest first, whose chance is worth the rows they add (`Drafting`).

    What is not drafted teaches nothing, and what was promised may not come. So there is an
    `Account` of the time that was lost against decoding plainly: a step is taken only while it
    covers what is lost if only the sure part of the gain comes. Texts that the drafter would first
    have to read are weighed by the tokens still to come. Where drafting is all but free, what it
    finds decides: where that is worth nothing, it rests for ever more steps.

    Where drafting pays, a plain step is timed now and then; at first where costs are not known.

    Args:
        max_k: levels to draft at most.
        costs: what steps take; None: nothing is known before the first.
    """

    RETURN = 3.0  # times what it takes, that texts must promise to be read for
    CHEAP = 0.1  # plain steps: drafting that takes no more shows by what it finds if it pays
    IN_VAIN = 0.005  # of all time, for drafting that finds nothing
    MARGIN = 1.02  # what another rung must promise before it is taken
    PRUDENCE = 1.05  # what drafts must promise over plain decoding: not all is in the model
    READY = 16  # tokens that a drafter catches up with in a usual step
    PLAIN_FIRST = 8  # drafted steps until a plain one is timed; then four times as many
    LOOK_EVERY = 4  # steps: deciding takes as long as some ops of a small model
    SETTLED = 32  # drafted steps, from which on it is looked at half as often
    LEARN_AT_ONCE = 8  # steps that drafted, at first
    SURPRISE = 1.5  # times what was planned: it is looked at again
    SLEEP = 32  # steps without drafts that are decided on at once, at most
    WAKING = 3  # the last of them tell how fast the machine is

    def __init__(self, max_k: int = 8, costs: CostModel | None = None) -> None:
        check("max_k", max_k, 0 <= max_k <= MAX_DRAFT, f"an integer from 0 to {MAX_DRAFT}")
        self.max_k = max_k
        self._times = StepTimes(UNMEASURED if costs is None else costs)
        self._account = Account()
        self._timed: dict[int, _Timed] = {}  # by doublings of the batch size
        self._asleep = 0  # steps without a look
        self._looked_at = 0  # the batch size that was looked at
        self._given: Sequence[Budget] = ()
        self._rungs: list[Budget] = [NO_DRAFT]
        self._last: dict[int, int] = {}  # by batch size, the rung taken last
        self._plan: Plan | None = None
        self._steps_left = 0  # until it is looked at again
        self._in_vain = self._rest = 0  # steps in a row that found nothing; and so many to rest
        self._now: Drafting | None = None
        self._pending: list[tuple[Drafting | None, StepObservation, float]] = []
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
        same = size == self._looked_at and self._account.knows(outlook.requests)
        if same and self._asleep > 0:
            self._asleep -= 1
            return ASLEEP
        ready = not outlook.unread or max(outlook.unread) <= self.READY
        plan = self._plan
        if not (same and ready and plan is not None and self._steps_left > 0):
            plan = self._plan = self._look(outlook)
            self._looked_at, self._steps_left = size, self._look_every
        self._steps_left -= 1
        if plan is None or plan.loss > self._account.may_lose(smallest=True):
            self._plan = None
            return ASLEEP if self._asleep > 0 else NOT_DRAFTED
        if self._rests(plan, size):
            return ASLEEP  # as without a drafter
        stake = self._account.may_lose(smallest=False)
        self._now = Drafting(plan, outlook, self._prospects, stake)
        everyone = len(plan.members) == size
        # Grown trees that were cut, or merely watched, were slower: see COSTS.md.
        judge = self._now if outlook.known.by_kind and outlook.known.asks else None
        return Choice(self._rungs[plan.rung], None if everyone else plan.members, judge)

    def _rests(self, plan: Plan, size: int) -> bool:
        """Whether nothing is drafted this time, although it pays by and large."""
        if plan.asked:
            self._rest -= 1
            return self._rest >= 0
        due = 1 if self.costs is UNMEASURED else self.PLAIN_FIRST
        timed = self._timed.setdefault(size.bit_length(), _Timed(due))
        timed.steps += 1
        if timed.steps < timed.due:
            return False
        timed.due = min(max(4 * timed.due, self.PLAIN_FIRST), timed.steps + 256)
        return True

    def _look(self, outlook: Outlook) -> Plan | None:
        """What is best as far as is known; None: not to draft."""
        self._digest()
        size, account, prospects = outlook.batch_size, self._account, self._prospects
        account.admit(outlook.requests, self._times.plain(size, outlook.context))
        members, reading = self._members(outlook)
        found = prospects.rates(outlook, members)
        rates, plain = found.rates, found.plain
        best = int(rates.argmax())
        last = self._last.get(size, 0)
        if rates[best] < rates[last] * self.MARGIN:
            best = last
        if rates[best] < rates[0] * self.PRUDENCE:
            best = 0
        self._last[size] = best
        self._report.promise(float(rates[best] / rates[0]))
        asks = outlook.known.asks
        asked = asks and bool(members) and found.drafting[1] <= self.CHEAP * plain
        tries = best == 0 and not asked
        sure, loss = prospects.sure(len(members)), 0.0
        if not asked:
            saved = plain - found.ms[best] / (1 + found.gains[best])
            to_come = max(outlook.remaining, default=SOME)
            account.expect(saved * to_come, size, prospects.acceptance.certainty)
            if tries:
                best = self._smallest_worth_trying(found)
            if asks:
                best = min(best, 1)  # the rest is asked for
            best, loss = self._covered(best, found, sure, reading)
            if best == 0 or not members:
                if tries or not members:
                    # Until the account might cover a try; it need not be looked at before.
                    least = float(found.ms[1] - plain) - account.ms if members else plain
                    self._asleep = min(int(least / (account.SHARE * plain)), self.SLEEP)
                return None
        if asks:
            best = len(self._rungs) - 1
        brought = float(prospects.ranks.sums[0][prospects.nodes[best]]) * len(members) / size
        return Plan(
            members=members,
            rung=best,
            times=found.times.tolist(),
            drafting=found.drafting.tolist(),
            plain=plain,
            price=max(float(rates.max()), size / plain) * (self.PRUDENCE if asked else 1.0),
            worth=found.pull[:, best].tolist(),
            worth_of=self._worth_of(found, best, members, brought),
            sure=sure * plain / size,
            loss=loss,
            reading=reading,
            tries=tries,
            asked=asked,
        )

    def follows(self, tokens: int, outlook: Outlook) -> bool:
        if outlook.ladder is not self._given:
            self._climb(outlook)
        if len(self._rungs) == 1:
            return False
        self._digest()
        self._account.admit(
            outlook.requests, self._times.plain(outlook.batch_size, outlook.context)
        )
        found = self._prospects.rates(outlook, range(outlook.batch_size))
        best = int(found.rates.argmax())
        gain = 1 + found.gains[best]
        cost = self._times.read(tokens)
        saved = found.plain * gain - found.ms[best]
        steps = sum(outlook.remaining) / (outlook.batch_size * gain)
        sure = self._prospects.acceptance.certainty
        if saved * steps <= cost:
            # Nothing to be gained, as far as is known: tried where it is all but free.
            return cost + found.ms[1] - found.plain <= self._account.ms and sure < 0.5
        return cost * (1 - sure) <= self._account.ms

    # What is learnt from steps.

    def observe(self, step: StepObservation) -> None:
        now, self._now = self._now, None
        if step.budget == NO_DRAFT:
            now = None  # also near the end of all texts, whatever was chosen
        if len(self._rungs) == 1:
            return
        self._account.passed(step.step_ms)
        if self._asleep > self.WAKING and now is None:
            self._report.count(step, step.step_ms)
            return
        tokens = 1.0  # of plain steps that would have got as far
        at_once = self._learnt < self.LEARN_AT_ONCE
        if now is not None:
            plan = now.plan
            if plan.asked:
                vain = now.value < plan.price * plan.drafting[1]
                self._in_vain = min(self._in_vain + 1, 16) if vain else 0
                most = plan.drafting[1] / (self.IN_VAIN * plan.plain)
                self._rest = int(min(2**self._in_vain - 1, most))
            brought = [len(r) * worth for r, worth in zip(step.accepted, plan.worth, strict=True)]
            tokens += sum(brought) / step.batch_size
            drafted = step.draft_ms if step.caught_up else plan.drafting[now.level or plan.rung]
            took = plan.verifying(_rows(step)) + drafted
            if step.step_ms > self.SURPRISE * took:
                at_once, self._plan = True, None
            self._account.ms += tokens * plan.plain - took
        self._pending.append((now, step, tokens))
        if at_once or len(self._pending) >= self._look_every:
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

    def _learn(self, now: Drafting, step: StepObservation) -> None:
        """From a step that drafted."""
        self._learnt += 1
        members, rung = now.plan.members, now.plan.rung
        acceptance = self._prospects.acceptance
        accepted = [step.accepted[i] for i in members]
        requests = [now.outlook.requests[i] for i in members]
        # What is known of a text already tells nothing new of others.
        news = [1 - acceptance.known(request) for request in requests]
        if now.kinds is not None:
            acceptance.learn(requests, now.kinds, accepted)
        else:
            acceptance.count(len(members))
        if step.budget == self._rungs[rung]:
            kept = None if now.kinds is None else [len(k) for k in now.kinds]
            self._prospects.ranks.learn(step.budget.nodes, accepted, kept, news)
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
        self._times.climb(self._rungs)
        self._last.clear()
        self._plan = None
        self._prospects = Prospects(self._rungs, outlook.known, self._times)

    @property
    def _look_every(self) -> int:
        return self.LOOK_EVERY if self._learnt < self.SETTLED else 2 * self.LOOK_EVERY

    def _members(self, outlook: Outlook) -> tuple[list[int], int]:
        """For whom to draft, by place, and how many tokens must be read for it."""
        size, unread = outlook.batch_size, outlook.unread
        able = range(size) if outlook.able is None else outlook.able
        if not unread or max(unread) <= self.READY:
            return list(able), 0
        members = [i for i in able if unread[i] <= self.READY]
        if outlook.joining:
            return members, 0  # what pays, is up to how many will be there
        waiting = sorted((unread[i], i) for i in able if unread[i] > self.READY)
        found = self._prospects.rates(outlook, range(size))
        best = int(found.rates.argmax())
        gain, account = 1 + found.gains[best], self._account.ms
        saved = (found.plain * gain - found.ms[best]) / size
        sure, reading = self._prospects.acceptance.certainty, 0
        together = found.own < 1
        if together and sure > 0.5:
            account += found.plain
        joined: list[int] = []
        for tokens, i in waiting:
            cost = self._times.read(reading + tokens) - self._times.read(reading)
            benefit = saved * outlook.remaining[i] / gain
            if benefit < self.RETURN * cost and (members or joined or sure > 0.5):
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

    def _smallest_worth_trying(self, found: Rates) -> int:
        """The first rung that would pay if every level were accepted."""
        levels = np.array([b.levels for b in self._rungs])
        pays = (1 + levels) * found.plain > found.ms
        return int(pays[1:].argmax()) + 1 if pays[1:].any() else 0

    def _worth_of(
        self, found: Rates, rung: int, members: list[int], brought: float
    ) -> list[list[float]]:
        """[n, members] of the n-th token that a step brings, where steps bring ``brought``."""
        lead = stragglers.lead(int(self._prospects.nodes[-1]), brought)
        shared = found.pull[members, rung] - found.own
        worth: list[list[float]] = (found.own + np.outer(lead, shared)).tolist()
        return worth

    def _covered(self, rung: int, found: Rates, sure: float, reading: int) -> tuple[int, float]:
        """The largest rung up to this one whose possible loss the account covers, and the loss: if
        only so much of what is gained comes as is ``sure``."""
        certainty = self._prospects.acceptance.certainty
        read = (1 - certainty) * self._times.read(reading)
        while rung > 0:
            loss = float(found.ms[rung] - found.plain * (1 + sure * found.gains[rung])) + read
            if loss <= self._account.may_lose(smallest=rung == 1):
                return rung, loss
            rung -= 1
        return 0, 0.0


def _rows(step: StepObservation) -> int:
    """Of the target's forward; all that the budget allows where it is not told."""
    return step.rows or step.batch_size * (1 + step.budget.nodes)


@dataclass
class _Timed:
    """When the next plain step is due, in steps that were to draft."""

    due: int
    steps: int = 0
