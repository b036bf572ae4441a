"""Measuring what steps cost: an engine of its own decodes random texts with scripted budgets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

from inferlab.config import MAX_DRAFT, MAX_TREE_NODES
from inferlab.models import TargetModel
from inferlab.scheduler import Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Choice, Controller, Judge, Outlook
from inferlab.specdec.costs import CostModel, DraftCosts, DraftTime, StepCosts, StepTime
from inferlab.specdec.drafters import Drafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import ASSUMED_ACCEPTANCE, NO_DRAFT, Budget, DraftTree, TreeShape
from inferlab.types import SamplingParams

SHORT, LONG = 32, 256
"""Tokens before the measured steps."""
GRID = ((1, SHORT, 64), (1, LONG, 4), (4, SHORT, 16), (4, LONG, 4), (16, SHORT, 8))
"""Sequences, their context, and the nodes up to which trees of 2^i are measured."""
MOST_ROWS = 128
"""Of steps with the real drafter."""
MOST_TOKENS = 512
"""Of a text, behind its context: more pages than for as many are not taken."""
REPEATS = 3
"""Steps of each kind, the median of which counts; the first of a batch is not counted at all."""


class NoRoomError(ValueError):
    """The context or the cache is too small for steps that were to be measured."""


class Scripted(Controller):
    """A controller that asks for what it is told."""

    max_k = MAX_DRAFT

    def __init__(self) -> None:
        self.budget = NO_DRAFT

    def choose(self, outlook: Outlook) -> Choice:
        return Choice(self.budget)

    def describe(self) -> dict[str, Any]:
        return {"controller": "scripted"}


class RandomDrafter(Drafter):
    """Any tokens, in a tree of a usual shape."""

    name = "random"
    max_nodes = MAX_TREE_NODES
    max_depth = 8

    def __init__(self, vocab_size: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._vocab_size = vocab_size
        self._shape = TreeShape.best([list(ASSUMED_ACCEPTANCE)], MAX_TREE_NODES - 1, self.max_depth)

    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        shape = self._shape.within(budget)
        size = (len(batch), shape.num_nodes)
        tokens = torch.randint(self._vocab_size, size, generator=self._generator)
        tokens = tokens.to(batch.device, torch.int32)
        tokens[:, 0] = batch.roots
        return DraftTree.of_shape(shape, tokens)

    def describe(self) -> dict[str, Any]:
        return {"drafter": self.name}


class Bench:
    """Steps of an engine, timed.

    Args:
        target: whose steps they are.
        policy: walks the trees.
        num_pages, page_size: of the K/V cache that there may be; it takes what GRID needs.
        drafter: from a number of pages to who drafts; None: random tokens.
    """

    def __init__(
        self,
        target: TargetModel,
        policy: Policy,
        num_pages: int,
        page_size: int,
        drafter: Callable[[int], Drafter] | None = None,
    ) -> None:
        self.target = target
        self.settles = drafter is not None  # a step first catches up with the one before
        most = max(batch * (context + MOST_TOKENS) for batch, context, _ in GRID)
        num_pages = min(num_pages, -(-most // page_size))
        self.drafter = drafter(num_pages) if drafter else RandomDrafter(target.vocab_size)
        self._script = Scripted()
        cache = target.new_cache(num_pages, page_size)
        self.engine = Engine(target, cache, policy, self._script, self.drafter, max_batch=1024)
        self._generator = torch.Generator().manual_seed(1)
        self.prefill_ms: dict[int, float] = {}
        """By batch, of the texts measured last."""
        self.caught_up_ms: dict[int, float] = {}
        """By batch, what the first draft for them took."""

    def steps(
        self, batch: int, context: int, budgets: Sequence[Budget], repeats: int = REPEATS
    ) -> Iterator[tuple[Budget, float, dict[str, float]]]:
        """Steps of ``batch`` texts, a budget after the other: each with the ms of the whole step
        and by phase. The texts repeat themselves, so that there is something to draft.

        Raises:
            NoRoomError: the context or the cache is too small for it.
            ValueError: a text ended in an error, such as logits that are NaN.
        """
        rounds = 1 + repeats * (2 if self.settles else 1)
        tokens = 2 + rounds * sum(1 + budget.levels for budget in budgets)
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
            self.prefill_ms[batch] = self.engine.clock.totals["prefill"] - before
            for budget in budgets[:1]:
                self._timed(budget)
            for _ in range(repeats):
                for budget in budgets:
                    if self.settles:
                        first = self._timed(budget)[1]["draft"]
                        if budget != NO_DRAFT and batch not in self.caught_up_ms:
                            self.caught_up_ms[batch] = first
                    timed = self._timed(budget)
                    for request in requests:
                        if request.finished:
                            raise ValueError(request.error or "a text ended before it was timed")
                    yield (budget, *timed)
        finally:
            for request in requests:
                self.engine.abort(request.request_id)

    def _timed(self, budget: Budget) -> tuple[float, dict[str, float]]:
        self._script.budget = budget
        before, start = dict(self.engine.clock.totals), time.perf_counter()
        self.engine.step()
        spent = (time.perf_counter() - start) * 1e3
        return spent, {p: ms - before[p] for p, ms in self.engine.clock.totals.items()}


def of_nodes(nodes: int) -> Budget:
    """A budget of so many nodes, the root included."""
    return Budget(min(nodes - 1, RandomDrafter.max_depth), nodes - 1)


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
    bench = Bench(target, policy, num_pages, page_size)
    keeping: dict[int, float] = {}  # ms of committing, without a drafter's state
    steps = []
    for batch, context, most in GRID:
        if batch > max_batch:
            continue
        budgets = [of_nodes(2**i) for i in range(most.bit_length())]
        for budget, ms, phases in _medians(bench, batch, context, budgets, REPEATS):
            steps.append(StepTime(batch, 1 + budget.nodes, context, ms - phases["draft"]))
            keeping[batch] = min(phases["commit"], keeping.get(batch, math.inf))
    if not steps:
        return None
    times, reading = [], []
    if drafter is not None:
        plain_prefill = bench.prefill_ms
        bench = Bench(target, policy, num_pages, page_size, drafter)
        ladder = [b for b in bench.drafter.ladder() if b.levels <= max_k]
        for batch in keeping:
            fitting = [b for b in ladder[1:] if batch * (1 + b.nodes) <= MOST_ROWS]
            budgets = [*ladder[:1], *fitting[len(fitting) // 2 :: max(1, len(fitting) // 2)]]
            found = _medians(bench, batch, SHORT, [NO_DRAFT, *budgets], 2)
            if not found:  # texts of a short context have no room for all of them
                found = _medians(bench, batch, SHORT // 2, [NO_DRAFT, *ladder[:1]], 1)
            for budget, _, phases in found:
                more = max(phases["commit"] - keeping[batch], 0.0)
                times.append(DraftTime(batch, budget.nodes, phases["draft"] + more))
            if len(found) > 1:
                # Texts are read when they are first drafted for, or with the target.
                late = bench.caught_up_ms[batch] - found[1][2]["draft"]
                beside = bench.prefill_ms[batch] - plain_prefill[batch]
                reading.append((batch * SHORT, max(late, 0.0) + max(beside, 0.0)))
    return CostModel(StepCosts.fit(steps), DraftCosts.of(times, reading))


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
) -> list[tuple[StepTime, float]]:
    """Steps measured now, each with its predicted ms."""
    bench = Bench(target, policy, num_pages, page_size)
    checked = []
    for batch, context in CHECKED:
        if batch <= max_batch:
            budgets = [of_nodes(nodes) for nodes in (1, 3, 6, 12, 24, 48) if batch * nodes <= 128]
            for budget, ms, phases in _medians(bench, batch, context, budgets, REPEATS):
                step = StepTime(batch, 1 + budget.nodes, context, ms - phases["draft"])
                checked.append((step, costs.ms(*step[:3])))
    return checked


def _medians(
    bench: Bench, batch: int, context: int, budgets: Sequence[Budget], repeats: int
) -> list[tuple[Budget, float, dict[str, float]]]:
    """Of the steps of each budget; of none where they do not fit."""
    seen: dict[Budget, list[tuple[float, dict[str, float]]]] = {}
    try:
        for budget, ms, phases in bench.steps(batch, context, budgets, repeats):
            seen.setdefault(budget, []).append((ms, phases))
    except NoRoomError:
        return []
    return [
        (
            budget,
            median(ms for ms, _ in found),
            {phase: median(phases[phase] for _, phases in found) for phase in found[0][1]},
        )
        for budget, found in seen.items()
    ]
