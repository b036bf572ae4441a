"""A replica whose steps are planned by the engine's own scheduler, on made-up tokens."""

from __future__ import annotations

from inferlab.scheduler import PageAllocator, Plan, Request, Scheduler
from inferlab.simulation.world import NEVER, Replica, World
from inferlab.types import SamplingParams

_GROUPS = 1 << 40
"""Tokens of groups begin here, so that they are nobody's else."""
_TEXTS = 1 << 20
"""Tokens between those of two texts."""


class ScheduledReplica(Replica):
    """Steps one by one, as `inferlab.specdec.engine.Engine` makes them."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        setting = world.setting
        self.scheduler = Scheduler(
            PageAllocator(world.pages, setting.page_size),
            setting.max_batch,
            setting.slots,
            setting.read_tokens,
            setting.shares,
            read_beside=world.read_beside,
        )
        self._plan = Plan()
        self._levels = 0
        self._begun = 0.0
        self._used = 0
        self._drafted_for: set[int] = set()

    def add(self, request: int, now: float) -> None:
        world = self.world
        made = Request(self._prompt(request), SamplingParams(max_tokens=world.output[request]))
        made.request_id = request
        world.queued[request] = now
        self.scheduler.add(made)
        waiting = len(self.scheduler.waiting)
        self.tally.longest_queue = max(self.tally.longest_queue, waiting)
        if self.at == NEVER:
            self._begin(now)

    def fire(self) -> list[int]:
        now, world, tally, plan = self.at, self.world, self.tally, self._plan
        tally.busy_s += now - self._begun
        tally.page_s += (now - self._begun) * self._used
        tally.steps += 1
        tally.walks += len(plan.decode)
        given = world.acceptance.emitted(self._levels)
        width = given.shape[1]
        for request in plan.decode:
            trace = world.trace[request.request_id]
            self._emit(request, int(given[trace, request.num_output % width]), now)
        for chunk in plan.chunks:
            chunk.request.num_cached = chunk.stop
            tally.read += chunk.stop - chunk.start
        for request in plan.started:
            self._emit(request, 1, now)
        done = [request.request_id for request in self.scheduler.retire()]
        for number in done:
            world.ended[number] = now
            tally.tokens += world.output[number]
            self._drafted_for.discard(number)
        tally.ended += len(done)
        self._begin(now)
        return done

    def _begin(self, now: float) -> None:
        scheduler, world, tally = self.scheduler, self.world, self.tally
        if not scheduler.has_work:
            self.at = NEVER
            return
        plan = self._plan = scheduler.plan()
        for request in plan.preempted:
            tally.preempted += 1
            world.queued[request.request_id] = now
            self._drafted_for.discard(request.request_id)
        for request in plan.admitted:
            tally.waited_s += now - world.queued[request.request_id]
            if request.num_preempted == 0:
                tally.shared += request.num_shared
        allocator = scheduler.allocator
        self._used = allocator.num_pages - allocator.num_free
        tally.most_pages = max(tally.most_pages, self._used)
        self._begun = now
        self.at = now + self._ms(plan) / 1e3

    def _ms(self, plan: Plan) -> float:
        """What a step takes."""
        prices, ms = self.world.prices, 0.0
        if plan.chunks:
            texts = len(plan.chunks)
            tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks)
            context = sum((chunk.start + chunk.stop) / 2 for chunk in plan.chunks) / texts
            ms += prices.read_ms(texts, tokens, context, len(plan.started))
        if plan.decode:
            batch = len(plan.decode)
            context = sum(len(request.tokens) for request in plan.decode) / batch
            useful = max(request.remaining for request in plan.decode) - 1
            self._levels = min(self.world.drafting.levels(batch, context), useful)
            ms += prices.decode_ms(batch, self._levels, context)
            if self._levels > 0 and prices.drafter_reads:
                new = [r for r in plan.decode if r.request_id not in self._drafted_for]
                if new:
                    ms += prices.drafter_ms(sum(len(request.tokens) for request in new))
                    self._drafted_for |= {request.request_id for request in new}
        return ms

    def _emit(self, request: Request, count: int, now: float) -> None:
        count = min(count, request.remaining)
        if self.world.first[request.request_id] == NEVER:
            self.world.first[request.request_id] = now
        request.tokens += [request.request_id] * count
        request.num_cached = len(request.tokens) - 1
        if request.remaining == 0:
            request.finish_reason = "length"

    def _prompt(self, request: int) -> list[int]:
        """Tokens that are those of others as far as they are said to be, and no further."""
        world = self.world
        shared, count = world.shared[request], world.prompt[request]
        group = _GROUPS + world.group[request] * _TEXTS
        own = (1 + request) * _TEXTS
        return [*range(group, group + shared), *range(own, own + count - shared)]
