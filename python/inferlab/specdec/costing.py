"""Measuring what steps cost: an engine of its own decodes random texts with scripted budgets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from inferlab.config import MAX_DRAFT, MAX_TREE_NODES
from inferlab.models import KVCache, TargetModel
from inferlab.models.graphs import captured_soon
from inferlab.scheduler import READ_TOKENS, Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Choice, Controller, Judge, Outlook, StepObservation
from inferlab.specdec.costs import CostModel, DraftCosts, DraftTime, StepCosts, StepTime
from inferlab.specdec.drafters import Drafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import (
    ASSUMED_ACCEPTANCE,
    NO_DRAFT,
    Budget,
    DraftTree,
    TreeShape,
    are_chains,
)
from inferlab.types import SamplingParams

SHORT, LONG = 32, 192
"""Tokens before the measured steps."""
GRID = ((1, SHORT, 64), (4, SHORT, 16), (1, LONG, 8), (16, SHORT, 8), (4, LONG, 4))
"""Sequences, their context, and the nodes up to which trees of 2^i are measured: first what tells
most for its time."""
LEAST_NODES = 16
"""Of one sequence trees up to as many are measured in any case: where steps are memory-bound, fewer
would not show what a row costs."""
TREE_DEPTH = 8
"""Of trees of random tokens."""
PLAIN_STEPS = 4
"""In a row, as most are taken: each is quicker than one behind other steps."""
MOST_ROWS = 128
"""Of steps with the real drafter."""
MOST_TOKENS = 512
"""Of a text, behind its context: more pages than for as many are not taken."""
PASSES, ENOUGH_S = 4, 0.7
"""All is measured so often, unless more time has passed, and the least counts: machines are
disturbed for longer than a step takes, and times are compared with each other."""
MOST_S = 2.0
"""On a CPU no more of the grid is begun behind it: what is left out is on the lines of what is
not. (Elsewhere steps are short, and captured first.)"""
CUDA_PASSES = 3
"""At least: steps are captured in the second one."""


class NoRoomError(ValueError):
    """The context or the cache is too small for steps that were to be measured."""


class Scripted(Controller):
    """A controller that asks for what it is told.

    Attributes:
        budget: what it is told.
        rows: of the last step's forward.
    """

    max_k = MAX_DRAFT

    def __init__(self) -> None:
        self.budget = NO_DRAFT
        self.rows = 0

    def choose(self, outlook: Outlook) -> Choice:
        return Choice(self.budget)

    def observe(self, step: StepObservation) -> None:
        self.rows = step.rows

    def describe(self, since: Any = None) -> dict[str, Any]:
        return {"controller": "scripted"}


class RandomDrafter(Drafter):
    """Any tokens.

    Args:
        chains: in chains; else in trees of a usual shape, whose K/V must be moved.
    """

    name = "random"
    max_nodes = MAX_TREE_NODES

    def __init__(self, vocab_size: int, *, chains: bool = False) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._vocab_size = vocab_size
        self.max_depth = self.max_nodes - 1 if chains else TREE_DEPTH
        if chains:
            self._shape = TreeShape.chain(self.max_depth)
        else:
            self._shape = TreeShape.best(
                [list(ASSUMED_ACCEPTANCE)], self.max_nodes - 1, self.max_depth
            )

    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        shape = self._shape.within(budget)
        size = (len(batch), shape.num_nodes)
        tokens = torch.randint(self._vocab_size, size, generator=self._generator)
        tokens = tokens.to(batch.device, torch.int32)
        tokens[:, 0] = batch.roots
        return DraftTree.of_shape(shape, tokens)

    def describe(self) -> dict[str, Any]:
        return {"drafter": self.name}


class Timed(NamedTuple):
    """A step: what was drafted at most, rows of its forward, ms of all of it, and by phase."""

    budget: Budget
    rows: int
    ms: float
    phases: dict[str, float]


class Least(dict[Any, float]):
    """The least time of each kind."""

    def keep(self, kind: Any, ms: float) -> None:
        self[kind] = min(ms, self.get(kind, math.inf))


class Bench:
    """Steps of an engine, timed.

    Args:
        target: whose steps they are.
        policy: walks the trees.
        cache: K/V pages, which others may use between its steps.
        drafter: who drafts.
    """

    def __init__(
        self, target: TargetModel, policy: Policy, cache: KVCache, drafter: Drafter
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.reads = not isinstance(
            drafter, RandomDrafter
        )  # texts, before it first drafts for them
        self._script = Scripted()
        self.engine = Engine(target, cache, policy, self._script, self.drafter, max_batch=1024)
        self._generator = torch.Generator().manual_seed(1)
        self.prefill_ms = Least()
        """By batch and context."""
        self.caught_up_ms = Least()
        """By batch, context and nodes, what the first draft for texts took."""

    def steps(
        self, batch: int, context: int, budgets: Sequence[Budget], repeats: int = 1
    ) -> Iterator[Timed]:
        """Steps of ``batch`` texts, a budget after the other. The texts repeat themselves, so that
        there is something to draft.

        Raises:
            NoRoomError: the context or the cache is too small for it.
            ValueError: a text ended in an error, such as logits that are NaN.
        """
        tokens = 2 + (1 + repeats) * sum(1 + budget.levels for budget in budgets)
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        requests = []
        for _ in range(batch):
            part = torch.randint(self.target.vocab_size, (12,), generator=self._generator)
            requests.append(Request((part.tolist() * (context // 12 + 1))[:context], params))
        try:
            self.engine.check(requests[0])
        except ValueError as error:
            raise NoRoomError(str(error)) from None
        needed = sum(map(self.engine.scheduler.pages_needed, requests))
        if needed > self.engine.cache.num_pages:
            raise NoRoomError(f"needs {needed} pages, there are {self.engine.cache.num_pages}")
        try:
            for request in requests:
                self.engine.add(request)
            self._script.budget = NO_DRAFT
            before = self.engine.clock.totals["prefill"]
            while any(r.num_output == 0 and not r.finished for r in requests):
                self.engine.step()
            spent = self.engine.clock.totals["prefill"] - before
            self.prefill_ms.keep((batch, context), spent)
            self._timed(budgets[0])  # a first step takes longer
            for budget in [b for b in budgets if b != NO_DRAFT and self.reads][:1]:
                first = self._timed(budget).phases["draft"]
                self.caught_up_ms.keep((batch, context, budget.nodes), first)
            for budget in [*budgets] * repeats:
                timed = self._timed(budget)
                for request in requests:
                    if request.finished:
                        raise ValueError(request.error or "a text ended before it was timed")
                yield timed
        finally:
            for request in requests:
                self.engine.abort(request.request_id)

    def _timed(self, budget: Budget) -> Timed:
        self._script.budget = budget
        before = dict(self.engine.clock.totals)
        with captured_soon():
            start = time.perf_counter()
            self.engine.step()
            spent = (time.perf_counter() - start) * 1e3
        phases = {p: ms - before[p] for p, ms in self.engine.clock.totals.items()}
        return Timed(budget, self._script.rows, spent, phases)


def of_nodes(nodes: int, most_levels: int = TREE_DEPTH) -> Budget:
    """A budget of so many nodes, the root included."""
    return Budget(min(nodes - 1, most_levels), nodes - 1)


def measure(
    target: TargetModel,
    policy: Policy,
    num_pages: int,
    page_size: int,
    drafter: Callable[[int], Drafter] | None = None,
    *,
    max_batch: int = 32,
    max_k: int = MAX_DRAFT,
) -> CostModel | None:
    """What steps cost; None where context or cache are too small for any.

    Args:
        target, policy, num_pages, page_size: of the engine that is to be.
        drafter: from a number of pages to its drafter; None: it decodes plainly.
        max_batch: larger batches are not measured.
        max_k: levels that will be drafted at most.
    """
    cache = _cache(target, num_pages, page_size)
    own = Bench(target, policy, cache, drafter(cache.num_pages)) if drafter is not None else None
    chains = own is not None and are_chains(own.drafter.ladder())
    bench = Bench(target, policy, cache, RandomDrafter(target.vocab_size, chains=chains))
    levels = bench.drafter.max_depth
    steps, keeping, drafts, found, kept = Least(), Least(), Least(), Least(), Least()
    drafted: list[tuple[int, Timed]] = []
    ends = time.perf_counter() + (MOST_S if target.device.type == "cpu" else math.inf)

    def late() -> bool:
        return bool(steps) and time.perf_counter() > ends

    for _ in _passes(target.device):
        for batch, context, most in GRID:
            if batch > max_batch or late():
                continue
            budgets = [NO_DRAFT] * PLAIN_STEPS
            budgets += [of_nodes(2**i, levels) for i in range(1, most.bit_length())]
            for budget, _, ms, phases in _fitting(bench.steps(batch, context, budgets)):
                steps.keep((batch, 1 + budget.nodes, context), ms - phases["draft"])
                keeping.keep(batch, phases["commit"])
                if late() and 1 + budget.nodes >= min(LEAST_NODES, most):
                    break
            if own is not None and context == SHORT and batch in keeping:
                for step in _drafted(own, batch, max_k):
                    key = batch, step.budget.nodes
                    drafts.keep(key, step.phases["draft"])
                    kept.keep(key, step.phases["commit"])
                    if step.rows > batch:  # a drafter may find nothing, which takes less
                        found.keep(key, step.phases["draft"])
                        drafted.append((batch, step))
                if batch == 1 and not late():  # reading takes its time, however short the text
                    first = [b for b in own.drafter.ladder() if b.levels <= max_k][:1]
                    list(_fitting(own.steps(1, LONG, [NO_DRAFT, *first])))
    if not steps:
        return None
    fitted = StepCosts.fit(_step_times(steps))
    read = _read_alone(bench)
    if own is None:
        return CostModel(fitted, reading=read)
    drafts.update(found)
    for (batch, nodes), ms in kept.items():
        if nodes == 0:  # keeping up with a step takes longer with a drafter's state
            drafts[batch, 0] += max(ms - keeping[batch], 0.0)
    drafting = [DraftTime(batch, nodes, ms) for (batch, nodes), ms in drafts.items()]
    reading = _reading(bench, own, drafts)
    slowed = _slowed(fitted, drafted)
    draft = DraftCosts.of(drafting, reading, chains=chains, slowed=slowed)
    return CostModel(fitted, draft, read)


def _cache(target: TargetModel, num_pages: int, page_size: int) -> KVCache:
    """Pages for all that is measured, as far as there may be so many."""
    most = max(batch * (context + MOST_TOKENS) for batch, context, _ in GRID)
    return target.new_cache(min(num_pages, -(-most // page_size)), page_size)


def _step_times(least: Least) -> list[StepTime]:
    """Of times by sequences, rows of each, and context."""
    return [StepTime(batch, nodes, context, ms) for (batch, nodes, context), ms in least.items()]


def _passes(device: torch.device) -> Iterator[int]:
    least = CUDA_PASSES if device.type == "cuda" else 1
    started = time.perf_counter()
    for i in range(1, PASSES + 1):
        yield i
        if i >= least and time.perf_counter() - started > ENOUGH_S:
            return


def _fitting(steps: Iterator[Timed]) -> Iterator[Timed]:
    """None where there is no room for them."""
    with suppress(NoRoomError):
        yield from steps


def _drafted(bench: Bench, batch: int, max_k: int) -> list[Timed]:
    """Plain steps, and those of the smallest rung, of the largest and of one in the middle."""
    ladder = [b for b in bench.drafter.ladder() if b.levels <= max_k]
    fitting = [b for b in ladder[1:] if batch * (1 + b.nodes) <= MOST_ROWS]
    budgets = [*ladder[:1], *fitting[len(fitting) // 2 :: max(1, len(fitting) // 2)]]
    steps = list(_fitting(bench.steps(batch, SHORT, [NO_DRAFT, *budgets], repeats=2)))
    # Texts of a short context have no room for all of them.
    return steps or list(_fitting(bench.steps(batch, SHORT // 2, [NO_DRAFT, *ladder[:1]])))


def _slowed(fitted: StepCosts, drafted: Sequence[tuple[int, Timed]]) -> float:
    """How much longer than by itself the target's part takes in steps that draft: other work in
    between, and a drafter's state to be kept. Plain steps in a row take what the least of them
    took; these do not, so it is their usual time that counts."""
    ratios = [
        (step.ms - step.phases["draft"]) / fitted.ms(batch, step.rows / batch, SHORT)
        for batch, step in drafted
    ]
    return max(median(ratios), 1.0) if ratios else 1.0


def _read_alone(bench: Bench) -> tuple[tuple[int, float], ...]:
    """By tokens, what one forward takes that reads texts up to their last tokens; more tokens never
    take less."""
    found = {
        batch * (context - 1): ms
        for (batch, context), ms in bench.prefill_ms.items()
        if batch * (context - 1) <= READ_TOKENS
    }
    sizes = sorted(found)
    times = np.maximum.accumulate([found[size] for size in sizes])
    return tuple((size, float(ms)) for size, ms in zip(sizes, times, strict=True))


def _reading(bench: Bench, own: Bench, drafts: Least) -> list[tuple[int, float]]:
    """By tokens, what texts take that a drafter reads: when they are first drafted for, or beside
    the target."""
    found = []
    for (batch, context, nodes), first in own.caught_up_ms.items():
        late = first - drafts.get((batch, nodes), 0.0)
        together = own.prefill_ms[batch, context]
        beside = together - bench.prefill_ms.get((batch, context), together)
        found.append((batch * context, max(late, 0.0) + max(beside, 0.0)))
    return found


CHECKED = ((1, 20), (1, 200), (3, 60), (8, 40), (8, 200), (16, 60))
"""Sequences and their context, other ones than the model is made of."""


def check(
    costs: StepCosts,
    target: TargetModel,
    policy: Policy,
    num_pages: int,
    page_size: int,
    *,
    max_batch: int = 32,
    chains: bool = False,
) -> list[tuple[StepTime, float]]:
    """Steps measured now, each with its predicted ms. ``chains``: as for the costs."""
    drafter = RandomDrafter(target.vocab_size, chains=chains)
    bench = Bench(target, policy, _cache(target, num_pages, page_size), drafter)
    measured = Least()
    for _ in _passes(target.device):
        for batch, context in CHECKED:
            if batch > max_batch:
                continue
            sizes = [n for n in (3, 6, 12, 24, 48) if batch * n <= MOST_ROWS]
            budgets = [NO_DRAFT] * PLAIN_STEPS
            budgets += [of_nodes(n, drafter.max_depth) for n in sizes]
            for budget, _, ms, phases in _fitting(bench.steps(batch, context, budgets)):
                measured.keep((batch, 1 + budget.nodes, context), ms - phases["draft"])
    return [(step, costs.ms(*step[:3])) for step in _step_times(measured)]
