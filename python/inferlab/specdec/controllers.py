"""Controllers: how much to draft in the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, NamedTuple, Protocol, runtime_checkable

from inferlab.config import MAX_DRAFT, MAX_TREE_NODES
from inferlab.specdec.tree import NO_DRAFT, Budget
from inferlab.types import check

CONTROLLERS = ("fixed", "adaptive", "cost")


class StepObservation(NamedTuple):
    """What a step told: its size, what it took and what was accepted.

    Attributes:
        batch_size: sequences.
        budget: what was drafted at most.
        step_ms: all of the step.
        depths: levels offered to each sequence.
        accepted: of each sequence, the ranks of the draft nodes that were accepted, from the root
            on: rank j is the j-th node that a budget of at least j nodes offers.
        caught_up: the drafter had to process tokens of earlier steps first, so its time says
            nothing about a usual step.
    """

    batch_size: int
    budget: Budget
    step_ms: float
    depths: list[int]
    accepted: list[list[int]]
    caught_up: bool = False


@runtime_checkable
class Controller(Protocol):
    """Chooses a budget before each step and hears how it went."""

    @property
    def max_k(self) -> int:
        """Levels that it may ask for."""
        ...

    def choose(self, batch_size: int, ladder: Sequence[Budget]) -> Budget:
        """How much to draft: ``NO_DRAFT``, a rung of the drafter's ladder, or what it likes."""
        ...

    def observe(self, step: StepObservation) -> None: ...

    def describe(self) -> dict[str, Any]: ...


class FixedController:
    """Always the same K: all the nodes that the drafter has for so many levels."""

    def __init__(self, k: int = 4) -> None:
        check("k", k, 0 <= k <= MAX_DRAFT, f"an integer from 0 to {MAX_DRAFT}")
        self.max_k = k

    def choose(self, batch_size: int, ladder: Sequence[Budget]) -> Budget:
        return Budget(self.max_k, MAX_TREE_NODES)

    def observe(self, step: StepObservation) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"controller": "fixed", "k": self.max_k}


class AdaptiveController:
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

    def choose(self, batch_size: int, ladder: Sequence[Budget]) -> Budget:
        return Budget(self.k, MAX_TREE_NODES)

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

    def describe(self) -> dict[str, Any]:
        return {
            "controller": "adaptive",
            "k": self.k,
            "min_k": self.min_k,
            "max_k": self.max_k,
            "target_acceptance": self.target_acceptance,
        }


@dataclass
class _Costs:
    """What is known about one batch size: measured step times, the rung in use, what to try next.

    Rungs are numbered from 1; 0 is not to draft. What is `.._at` counts in `steps`.
    """

    plan: list[int]  # rungs to run before deciding again: the warm-up, later probes
    interval: int
    probe_at: int
    steps: int = 0
    decide_at: int = 0
    listen_at: int = 0  # steps before it are not looked at
    climbing: bool = True
    lost_ms: float = 0.0  # by what was tried since the last probe, against the rung in use
    times: dict[int, deque[float]] = field(default_factory=dict)
    current: int = 0


class CostController:
    """Picks the rung of the drafter's ladder, no draft included, that gives most tokens per second.

    expected tokens(n nodes) / step time(n nodes), where

    * expected tokens = 1 + sum over ranks j <= n of the share of sequences whose walk went through
      the draft node of rank j (a node is on the walk or not, so this is exact for any tree), with
      exponential forgetting;
    * step time is the (low) median of the last measured steps of that rung (draft, verify and
      overhead), interpolated for a rung between measured ones, per batch size (in powers of two).

    A batch size begins without drafts and on the first rung, or where its nearest neighbour is, and
    climbs, every time to a rung twice as high, while the highest one keeps up with the best: trees
    that are too large for a batch are not even tried. Afterwards other rungs are measured again now
    and then: while not drafting is best, at intervals that grow fourfold up to
    ``MAX_PROBE_INTERVAL`` steps, and but for the first not before what the last probe lost is
    ``PROBE_SHARE`` of the time since (a draft model that slept has the whole text to catch up
    with), so that a useless drafter costs next to nothing.

    Args:
        max_k: levels to draft at most.
    """

    FORGET = 0.98  # weight of what was known, per step
    SAMPLES = 9  # step times kept per rung
    DECIDE_EVERY = 4  # steps: deciding takes as long as some ops of a small model
    PROBE_INTERVAL = 32
    MAX_PROBE_INTERVAL = 2048
    PROBE_SHARE = 0.002
    MARGIN = 1.02  # what another rung must promise before it is taken
    PROMISING = 0.9  # of the best rate: from a rung that reaches it the climb goes on
    HOPE, HOPED_STEPS = 0.7, 4  # acceptance of the first node, before anything is known
    UNKNOWN = 0.9  # acceptance of a node that was never tried, relative to the one before

    def __init__(self, max_k: int = 8) -> None:
        check("max_k", max_k, 0 <= max_k <= MAX_DRAFT, f"an integer from 0 to {MAX_DRAFT}")
        self.max_k = max_k
        self._given: Sequence[Budget] = ()
        self._rungs: list[Budget] = [NO_DRAFT]
        self._forget_all()

    def choose(self, batch_size: int, ladder: Sequence[Budget]) -> Budget:
        if ladder is not self._given:
            self._climb(ladder)
        costs = self._of(batch_size)
        return self._rungs[costs.plan[0] if costs.plan else costs.current]

    def observe(self, step: StepObservation) -> None:
        costs = self._of(step.batch_size)
        costs.steps += 1
        if costs.steps < costs.listen_at:
            return
        # Near a sequence's end the engine drafts less than it was told to: that is no rung.
        if step.budget in self._rungs:
            self._learn_acceptance(step)
            if not step.caught_up:
                rung = self._rungs.index(step.budget)
                costs.times.setdefault(rung, deque(maxlen=self.SAMPLES)).append(step.step_ms)
        if costs.plan:
            costs.lost_ms += self._loss(costs, step)
            costs.plan.pop(0)
            if not costs.plan:
                wait = self._steps_to_earn(costs)
                if costs.interval == self.PROBE_INTERVAL:
                    wait = 0  # something else may have been in the way: once more, soon
                costs.probe_at = costs.steps + max(costs.interval, wait)
                costs.decide_at = costs.steps
        if not costs.plan and costs.steps >= costs.decide_at:
            costs.decide_at = costs.steps + self.DECIDE_EVERY
            self._decide(costs)
            if costs.current == 0 and not costs.plan:
                # While nothing is drafted nothing is learnt that could change that.
                costs.decide_at = costs.probe_at
                costs.listen_at = costs.probe_at - self.SAMPLES

    def describe(self) -> dict[str, Any]:
        by_size = {2 ** (bits - 1): costs for bits, costs in sorted(self._costs.items())}
        return {
            "controller": "cost",
            "max_k": self.max_k,
            "chosen_nodes": {s: self._rungs[costs.current].nodes for s, costs in by_size.items()},
            "step_ms": {
                size: {
                    self._rungs[rung].nodes: round(median_low(v), 4)
                    for rung, v in sorted(costs.times.items())
                }
                for size, costs in by_size.items()
            },
            "acceptance": [round(p, 4) for p in self._acceptance()],
        }

    def _climb(self, ladder: Sequence[Budget]) -> None:
        """Takes up a drafter's ladder, cut to ``max_k`` levels."""
        self._given = ladder
        rungs = [Budget(min(b.levels, self.max_k), b.nodes) for b in ladder]
        rungs = [b for b in dict.fromkeys(rungs) if b.levels > 0]
        if all(b.levels == b.nodes for b in ladder):  # a chain: nodes are levels
            rungs = [b for b in rungs if b.nodes <= self.max_k]
        rungs = [NO_DRAFT, *rungs]
        if rungs != self._rungs:
            self._rungs = rungs
            self._forget_all()

    def _forget_all(self) -> None:
        nodes = self._rungs[-1].nodes
        # The first node begins as if seen in steps that went well: bad luck in the first few real
        # ones must not end drafting for long.
        self._accepted = [self.HOPE * self.HOPED_STEPS, *[0.0] * (nodes - 1)]
        self._offered = [float(self.HOPED_STEPS), *[0.0] * (nodes - 1)]
        self._costs: dict[int, _Costs] = {}
        self._probe_turn = 0

    def _of(self, batch_size: int) -> _Costs:
        bits = batch_size.bit_length()
        if bits not in self._costs:
            self._costs[bits] = self._begin(bits)
        return self._costs[bits]

    def _begin(self, bits: int) -> _Costs:
        """Costs of a batch size that is new: from its nearest neighbour's choice on, if any."""
        known = [b for b, costs in self._costs.items() if not costs.plan]
        near = min(known, key=lambda b: abs(b - bits), default=None)
        current = 0 if near is None else self._costs[near].current
        if len(self._rungs) == 1 or (near is not None and near < bits and current == 0):
            plan = []  # what does not pay in a small batch does not in a larger one
        else:
            # The first step of its kind pays for cold caches.
            plan = [current, 0, current] if current else [0, 1, 1, 0]
        return _Costs(plan, self.PROBE_INTERVAL, self.PROBE_INTERVAL, current=current)

    def _learn_acceptance(self, step: StepObservation) -> None:
        # A node that the drafter did not offer (no n-gram found, say) counts as not accepted.
        for i in range(step.budget.nodes):
            self._accepted[i] *= self.FORGET
            self._offered[i] = self._offered[i] * self.FORGET + len(step.accepted)
        for ranks in step.accepted:
            for rank in ranks:
                if rank <= step.budget.nodes:
                    self._accepted[rank - 1] += 1

    def _acceptance(self) -> list[float]:
        """P(the node of rank j is accepted), j = 1 and on; shrunk towards the one before."""
        chances: list[float] = []
        for accepted, offered in zip(self._accepted, self._offered, strict=True):
            prior = self.UNKNOWN * chances[-1] if chances else 0.5
            chances.append((accepted + prior) / (offered + 1))
        return chances

    def _expected_tokens(self) -> list[float]:
        """By rung."""
        chances = self._acceptance()
        return [1.0 + sum(chances[: rung.nodes]) for rung in self._rungs]

    def _step_time(self, times: dict[int, float], rung: int) -> float:
        """Measured, or on the line through the nearest measured neighbours."""
        if rung in times:
            return times[rung]
        known = sorted(times)
        lower = max((x for x in known if x < rung), default=known[0])
        upper = min((x for x in known if x > rung), default=known[-1])
        if not lower < rung < upper:
            lower, upper = known[0], known[-1]
        if lower == upper:
            return times[lower]
        start, end, at = (self._rungs[r].nodes for r in (lower, upper, rung))
        slope = (times[upper] - times[lower]) / (end - start)
        return max(times[lower] + slope * (at - start), 1e-6)

    def _loss(self, costs: _Costs, step: StepObservation) -> float:
        """Milliseconds that a step took longer than the rung in use takes for as many tokens."""
        times = costs.times.get(costs.current)
        if not times:
            return 0.0
        tokens = 1.0 + sum(map(len, step.accepted)) / len(step.accepted)
        return step.step_ms - tokens * median_low(times) / self._expected_tokens()[costs.current]

    def _steps_to_earn(self, costs: _Costs) -> int:
        """Steps after which what was lost by trying is ``PROBE_SHARE`` of the time."""
        lost, costs.lost_ms = costs.lost_ms, 0.0
        times = costs.times.get(costs.current)
        return int(lost / (self.PROBE_SHARE * median_low(times))) if times else 0

    def _decide(self, costs: _Costs) -> None:
        times = {rung: median_low(v) for rung, v in costs.times.items()}
        if not times or len(self._rungs) == 1:
            return
        top, highest = len(self._rungs) - 1, max(times)
        # The rung in use counts even where no step of it could be measured yet.
        expected = self._expected_tokens()[: max(highest, costs.current) + 1]
        rates = [tokens / self._step_time(times, rung) for rung, tokens in enumerate(expected)]
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] > rates[costs.current] * self.MARGIN:
            costs.current = best
        if 0 < highest < top and costs.climbing:
            costs.climbing = rates[highest] >= self.PROMISING * rates[best]
            if costs.climbing:
                costs.plan = [min(2 * highest, top)] * 2
                return
        if costs.steps >= costs.probe_at:
            self._plan_probe(costs)

    def _plan_probe(self, costs: _Costs) -> None:
        top = len(self._rungs) - 1
        if costs.current == 0:
            # Twice: a drafter that slept catches up in the first.
            costs.plan = [min(2, top)] * 2
            costs.interval = min(4 * costs.interval, self.MAX_PROBE_INTERVAL)
        else:
            costs.interval = self.PROBE_INTERVAL
            others = (0, min(costs.current + 1, top), costs.current - 1)
            costs.plan = [others[self._probe_turn % len(others)]]
            self._probe_turn += 1


def make_controller(
    name: str,
    *,
    k: int = 4,
    min_k: int = 1,
    max_k: int = 8,
    target_acceptance: float = 0.7,
) -> Controller:
    """The controller ``name``: ``k`` for fixed, the bounds for adaptive, ``max_k`` for cost."""
    check("controller", name, name in CONTROLLERS, f"one of {', '.join(CONTROLLERS)}")
    if name == "fixed":
        return FixedController(k)
    if name == "adaptive":
        return AdaptiveController(min_k, max_k, target_acceptance)
    return CostController(max_k)
