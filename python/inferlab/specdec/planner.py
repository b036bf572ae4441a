"""The controller that knows what steps cost: it drafts where that pays, at a bounded price."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from inferlab.config import MAX_DRAFT
from inferlab.specdec.acceptance import Acceptance
from inferlab.specdec.control import Choice, Controller, Outlook, StepObservation
from inferlab.specdec.costs import CostModel, DraftCosts, Drift, StepCosts
from inferlab.specdec.ranks import Ranks
from inferlab.specdec.tree import NO_DRAFT, Budget
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
    LUCK = 2.5  # plain steps that the account may be short of, where what is certain pays
    MARGIN = 1.02  # what another rung must promise before it is taken
    PRUDENCE = 1.05  # what drafts must promise over their price: some of it is not in the model
    TOGETHER = 0.025  # more of it per doubling of a batch that ends with its last sequence
    READY = 16  # tokens that a drafter catches up with in a usual step
    PLAIN_FIRST = 8  # drafted steps until a second plain one is timed; then four times as many
    BEHIND = 6.0  # tokens by which a sequence is behind others that matter less
    LOOK_EVERY = 4  # steps: deciding takes as long as some ops of a small model
    SLEEP = 32  # steps without drafts that are decided on at once, at most

    def __init__(self, max_k: int = 8, costs: CostModel | None = None) -> None:
        check("max_k", max_k, 0 <= max_k <= MAX_DRAFT, f"an integer from 0 to {MAX_DRAFT}")
        self.max_k = max_k
        self.costs = UNMEASURED if costs is None else costs
        self._verifying, self._drafting, self._reading = Drift(), Drift(), Drift()
        self._account = 0.0  # ms
        self._newest = -1  # the last request that was seen
        self._timed: dict[int, _Timed] = {}  # by doublings of the batch size
        self._asleep = 0  # steps without a look
        self._looked_at = 0  # the batch size that was looked at
        self._given: Sequence[Budget] = ()
        self._rungs: list[Budget] = [NO_DRAFT]
        self._tables: dict[Any, Any] = {}
        self._last: dict[int, int] = {}  # by batch size, the rung taken last
        self._plan: _Plan | None = None
        self._steps_left = 0  # until it is looked at again
        self._now: _Drafting | None = None
        self._report = _Report()

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
        worth = self._worth(outlook)
        self._now = _Drafting(plan, outlook, worth, max(self._account, 0.0) - plan.loss)
        everyone = len(plan.members) == size
        # Grown trees that were cut, or merely watched, were slower: see COSTS.md.
        judge = self if outlook.known.by_kind and outlook.known.asks else None
        return Choice(self._rungs[plan.rung], None if everyone else plan.members, judge)

    def _look(self, outlook: Outlook) -> _Plan | None:
        """What is best as far as is known; None: not to draft."""
        size = outlook.batch_size
        times = self._verify_ms(outlook)
        plain = float(times[size])
        self._admit(outlook, plain)
        members, reading = self._members(outlook, times)
        rates, ms, gains = self._rates(outlook, times, len(members))
        best = int(rates.argmax())
        last = self._last.get(size, 0)
        if rates[best] < rates[last] * self.MARGIN:
            best = last
        prudence = self.PRUDENCE
        if not outlook.waiting:
            prudence += self.TOGETHER * math.log2(size)
        if rates[best] < rates[0] * prudence:
            best = 0
        self._last[size] = best
        self._report.promise(float(rates[best] / rates[0]))
        tries = best == 0
        if tries:
            best = self._smallest_worth_trying(plain, ms)
        if outlook.known.asks and best > 0:
            best = 1  # the rest is asked for
        best, loss = self._covered(best, plain, ms, gains, reading)
        if best == 0 or not members:
            if tries or not members:
                # Until the account might cover a try; it need not be looked at before.
                least = float(ms[1] - plain) - self._account if members else plain
                self._asleep = min(int(least / (self.SHARE * plain)), self.SLEEP)
            return None
        if outlook.known.asks:
            best = len(self._rungs) - 1
        price = max(float(rates.max()), size / plain) * prudence
        return _Plan(members, best, times, plain, price, tries, reading, loss)

    def follows(self, tokens: int, outlook: Outlook) -> bool:
        if outlook.ladder is not self._given:
            self._climb(outlook)
        if len(self._rungs) == 1:
            return False
        size = outlook.batch_size
        times = self._verify_ms(outlook)
        plain = float(times[size])
        self._admit(outlook, plain)
        rates, ms, gains = self._rates(outlook, times, size)
        best = int(rates.argmax())
        cost = self._read_ms(tokens)
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
        now.level += 1
        if plan.tries or now.level + 1 >= len(self._rungs):
            return False
        if now.drafting is None:
            now.drafting = self._draft_ms(len(requests))
        size = now.outlook.batch_size
        of, worth = self._acceptance.of, now.worth_of_members
        hope = self._ranks.again * sum(
            [
                of(request, (kind,))[0] * value
                for request, kind, value in zip(requests, kinds, worth, strict=True)
            ]
        )
        # Another level, and at least a row where it is worth something.
        more = float(now.drafting[now.level + 1] - now.drafting[now.level])
        rows = size + len(requests) * now.level
        if rows + 1 < len(plan.times):
            more += float(plan.times[rows + 1] - plan.times[rows])
        now.left -= more - self._acceptance.certainty * hope * plan.plain / size
        return hope > plan.price * more and now.left >= 0

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
        worth = now.worth_of_members
        chances = [[c * value for c in of] for of, value in zip(chances, worth, strict=True)]
        if packs:
            found = sorted([(c, s) for s, of in enumerate(chances) for c in of], reverse=True)
            rows = np.arange(size, size + len(found) + 1)
            brought = np.cumsum([0.0, *(c for c, _ in found)])
        else:
            most = max(map(len, chances), default=0)
            rows = size * np.arange(1, most + 2)
            by_rank = [sum(c[n] for c in chances if n < len(c)) for n in range(most)]
            brought = np.cumsum([0.0, *by_rank])
        spent = plan.times[np.minimum(rows, len(plan.times) - 1)] - plan.plain
        value = brought - plan.price * spent
        sure = self._acceptance.certainty * plan.plain / size
        value[spent > max(self._account, 0.0) + sure * brought + 1e-9] = -math.inf
        value[0] = max(value[0], 0.0)
        best = int(value.argmax())
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
        size = step.batch_size
        if self._asleep > 0 and now is None:
            self._report.count(step, step.step_ms)
            self._account += self.SHARE * step.step_ms
            return
        tokens = 1.0  # of plain steps that would have got as far
        if now is not None:
            tokens = self._progress(now.outlook, step.accepted)
        rows = step.rows or size * (1 + step.budget.nodes)
        predicted, plain = self._predicted(size, rows), self._predicted(size, size)
        verify_ms = step.step_ms - step.draft_ms
        if now is None and step.heard:
            verify_ms -= self.costs.draft.ms(size, 0)  # what keeping up takes
        self._verifying.observe(_shape_kind(size, rows), predicted, verify_ms)
        plain *= self._verifying.factor(_shape_kind(size, size))
        took = predicted * self._verifying.factor(_shape_kind(size, rows))
        if now is not None:
            took += self._learn(now, step)
        self._report.count(step, tokens * plain)
        self._account += self.SHARE * step.step_ms
        if now is not None:
            self._account += tokens * plain - took
        self._account = min(self._account, self.SAVINGS * plain)

    def _learn(self, now: _Drafting, step: StepObservation) -> float:
        """From a step that drafted; returns the ms that drafting takes in such a one."""
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
        usual = self.costs.draft.ms(len(members), drafted.nodes)
        kind = (len(members).bit_length(), drafted)
        if step.caught_up:
            read = max(step.draft_ms - usual * self._drafting.factor(kind), 1e-6)
            self._reading.observe(None, self.costs.draft.reading_ms(now.plan.reading), read)
            return step.draft_ms
        self._drafting.observe(kind, usual, step.draft_ms)
        return usual * self._drafting.factor(kind)

    def describe(self) -> dict[str, Any]:
        return {
            "controller": "cost",
            "max_k": self.max_k,
            **self._report.describe(),
        }

    # How a choice is made.

    def _climb(self, outlook: Outlook) -> None:
        """Takes up a drafter's ladder, cut to ``max_k`` levels."""
        self._given = ladder = outlook.ladder
        rungs = [Budget(min(b.levels, self.max_k), b.nodes) for b in ladder]
        rungs = [b for b in dict.fromkeys(rungs) if b.levels > 0]
        if all(b.levels == b.nodes for b in ladder):  # a chain: nodes are levels
            rungs = [b for b in rungs if b.nodes <= self.max_k]
        self._rungs = [NO_DRAFT, *rungs]
        self._nodes = np.array([b.nodes for b in self._rungs])
        self._tables.clear()
        self._last.clear()
        self._plan = None
        known = outlook.known
        self._acceptance = Acceptance(known.by_kind, known.evidence)
        self._ranks = Ranks(self._rungs[-1].nodes, known.by_rank)

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
        rates, ms, gains = self._rates(outlook, times, size)
        best = int(rates.argmax())
        saved = (plain * (1 + gains[best]) - ms[best]) / size
        sure, reading = self._acceptance.certainty, 0
        for tokens, i in waiting:
            cost = self._read_ms(reading + tokens) - self._read_ms(reading)
            benefit = saved * outlook.remaining[i] / (1 + gains[best])
            if benefit < 1.2 * cost and (members or sure > 0.5):
                break
            account -= cost * (1 - sure)
            if account < 0:
                break
            members.append(i)
            reading += tokens
        return sorted(members), reading

    def _rates(
        self, outlook: Outlook, times: np.ndarray, members: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each rung: tokens per ms, ms, and tokens beyond the plain one per sequence."""
        size = outlook.batch_size
        accepted, kept = self._ranks.sums
        share = members / size
        gains = share * accepted[self._nodes]
        rows = size + members * kept[self._nodes] if outlook.packs else size * (1 + self._nodes)
        ms = times[np.minimum(np.ceil(rows).astype(int), len(times) - 1)] + self._draft_ms(members)
        return size * (1 + gains) / ms, ms, gains

    def _smallest_worth_trying(self, plain: float, ms: np.ndarray) -> int:
        """The first rung that would pay if every level were accepted."""
        for rung in range(1, len(self._rungs)):
            if (1 + self._rungs[rung].levels) * plain > ms[rung]:
                return rung
        return 0

    def _covered(
        self, rung: int, plain: float, ms: np.ndarray, gains: np.ndarray, reading: int
    ) -> tuple[int, float]:
        """The largest rung up to this one whose possible loss the account covers, and the loss."""
        sure = self._acceptance.certainty
        more = (1 - sure) * self._read_ms(reading)
        while rung > 0:
            loss = float(ms[rung] - plain * (1 + sure * gains[rung])) + more
            if self._covers(loss, plain):
                return rung, loss
            rung -= 1
        return 0, 0.0

    def _covers(self, loss: float, plain: float) -> bool:
        """Whether the account covers a possible loss, in ms."""
        return loss <= (self._account if loss > 0 else self._account + self.LUCK * plain)

    def _worth(self, outlook: Outlook) -> list[float]:
        """What a token of each sequence is worth, relative to one for all of them.

        Where nobody waits for its place, a sequence that ends early saves its own share of the
        steps to come only; how many there are, is up to the sequences that are behind. What a step
        takes for a sequence, and what for all, is told from a batch of one. Who is behind counts by
        exp(remaining / ``BEHIND``).
        """
        size = outlook.batch_size
        own = self._own_share(outlook)
        if own == 1:
            return [1.0] * size
        most = max(outlook.remaining)
        behind = [math.exp((n - most) / self.BEHIND) for n in outlook.remaining]
        scale = (1 - own) * size / sum(behind)
        return [own + scale * value for value in behind]

    def _progress(self, outlook: Outlook, accepted: Sequence[Sequence[int]]) -> float:
        """How many plain steps would have brought the batch as near to its end as this one did."""
        size = outlook.batch_size
        gained = [1 + len(ranks) for ranks in accepted]
        own = self._own_share(outlook)
        mean = sum(gained) / size
        if own == 1:
            return mean
        most = max(outlook.remaining)
        now = after = 0.0  # what `_worth` is the slope of
        for n, more in zip(outlook.remaining, gained, strict=True):
            now += math.exp((n - most) / self.BEHIND)
            after += math.exp((max(n - more, 0) - most) / self.BEHIND)
        return own * mean + (1 - own) * self.BEHIND * math.log(now / after)

    def _own_share(self, outlook: Outlook) -> float:
        """Of a plain step's time, what it takes for single sequences; 1 where each token counts."""
        size = outlook.batch_size
        if size == 1 or outlook.waiting or len(outlook.remaining) != size:
            return 1.0
        all_ms, one_ms = self._predicted(size, size), self._predicted(1, 1)
        return min(max((all_ms - one_ms) / (size - 1), 0.0) * size / all_ms, 1.0)

    # What steps take.

    def _predicted(self, size: int, rows: int) -> float:
        return max(self.costs.step.ms(size, rows / size, self._context), 1e-6)

    def _verify_ms(self, outlook: Outlook) -> np.ndarray:
        """By rows of a step of that many sequences, from 0: ms but for drafting."""
        size = outlook.batch_size
        self._context = context = 64.0 * round(outlook.context / 64)
        table = self._tables.get((size, context))
        if table is None:
            if len(self._tables) > 256:
                self._tables.clear()
            most = size * (1 + self._rungs[-1].nodes)
            ms = self.costs.step.ms_up_to(size, most, context)
            rows = np.maximum(np.arange(most + 1), size)
            kinds = np.rint(2 * np.log2(rows / size)).astype(int) + 1
            kinds[rows == size] = 0
            table = self._tables[size, context] = np.maximum(ms, 1e-6), kinds
        ms, kinds = table
        drift = self._verifying
        bits = size.bit_length()
        factors = np.array([drift.factor((bits, i - 1)) for i in range(kinds[-1] + 1)])
        corrected: np.ndarray = ms * factors[kinds]
        return np.maximum.accumulate(corrected)

    def _draft_ms(self, members: int) -> np.ndarray:
        """By rung: what drafting for so many takes."""
        table = self._tables.get(members)
        if table is None:
            costs = self.costs.draft
            ms = [costs.ms(members, b.nodes) if members else 0.0 for b in self._rungs]
            table = self._tables[members] = np.array(ms)
        bits, drift = members.bit_length(), self._drafting
        return table * np.array([drift.factor((bits, b)) for b in self._rungs])

    def _read_ms(self, tokens: int) -> float:
        return self.costs.draft.reading_ms(tokens) * self._reading.factor(None)


def _shape_kind(size: int, rows: int) -> tuple[int, int]:
    """Steps that are off alike: sequences by doublings, and rows for each by halves of them."""
    return size.bit_length(), round(2 * math.log2(rows / size)) if rows > size else -1


class _Plan(NamedTuple):
    """What was decided for some steps."""

    members: list[int]
    rung: int
    times: np.ndarray  # of verifying, by rows
    plain: float  # ms
    price: float  # tokens per ms
    tries: bool  # to learn, not to gain
    reading: int  # tokens
    loss: float  # ms, if only what is certain comes


class _Drafting:
    """The step under way."""

    def __init__(self, plan: _Plan, outlook: Outlook, worth: list[float], left: float) -> None:
        self.plan = plan
        self.outlook = outlook
        self.worth = worth  # of a token of each sequence
        self.worth_of_members = [worth[i] for i in plan.members]
        self.left = left  # of the account, if only what is certain comes
        self.level = 0  # drafted so far
        self.drafting: np.ndarray | None = None  # ms by level
        self.kinds: list[list[int]] | None = None  # of the nodes that are verified


@dataclass
class _Timed:
    """When the next plain step is due, in steps that were to draft."""

    steps: int = 0
    due: int = 1


class _Report:
    """What was decided, and what came of it."""

    def __init__(self) -> None:
        self._steps: Counter[int] = Counter()  # by nodes for each sequence
        self._spent = self._plain = 0.0  # ms of all steps, and of plain ones for as many tokens
        self._promised = 1.0
        self._largest = 0

    def promise(self, speedup: float) -> None:
        self._promised = speedup

    def count(self, step: StepObservation, plain_ms: float) -> None:
        self._steps[step.budget.nodes] += 1
        self._spent += step.step_ms
        self._plain += plain_ms
        self._largest = max(self._largest, step.batch_size)

    def describe(self) -> dict[str, Any]:
        total = self._steps.total()
        drafted = total - self._steps[0]
        gain = self._plain / self._spent if self._spent else 1.0
        if not total:
            verdict = "no step was decoded"
        elif drafted * 2 < total:
            verdict = (
                f"drafting did not pay at batch {self._largest}: {self._promised:.2f} x predicted; "
                f"{total - drafted} of {total} steps decoded plainly"
            )
        else:
            verdict = f"drafted in {drafted} of {total} steps: {gain:.2f} x plain decoding"
        return {
            "steps_by_nodes": {str(nodes): n for nodes, n in sorted(self._steps.items()) if n},
            "predicted_speedup": round(self._promised, 3),
            "speedup": round(gain, 3),
            "verdict": verdict,
        }
