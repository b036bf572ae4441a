"""Who runs in the next step, within the batch and the pages there are."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count

from inferlab.scheduler.pages import PageAllocator
from inferlab.scheduler.plan import Chunk, Plan
from inferlab.scheduler.prefixes import PrefixKeys
from inferlab.scheduler.request import Request

READ_TOKENS = 512
"""Tokens that a step reads at most, of all texts together."""
READ_BESIDE = 128
"""The same in a server on CPUs while others decode, or come to their first token, where it is not
known what reading costs. Rows beyond 64 take as long each, however many there are: to read in small
parts costs next to nothing."""
SHORT_READ = 64
"""Texts with no more tokens to read are read before longer ones."""
SPARE_PAGES = 7
"""A request that needs a page gets so many more where pages are plenty."""
MAX_OVERTAKEN = 64
"""A request that so many later ones have overtaken is overtaken by no more."""


class Scheduler:
    """Plans steps.

    Requests are admitted in the order of their priorities, then of their arrival, when there are
    pages for what they have to read and one draft tree. They take more as they grow; where there
    are none left, the running request that comes last in that order gives up its pages and is read
    anew later. So the first of all always runs to its end, and no request waits without bound:
    one that was overtaken often goes before all priorities.

    Args:
        allocator: the pool's pages.
        max_batch: requests that run together at most.
        tree_slots: slots behind the committed tokens that a step's tree may fill.
        read_tokens: tokens that a step reads at most, roots not counted.
        read_beside: the same while not all that run are long texts to be read; None: as many.
        shares: whether texts that begin alike share the pages of it.
        adopt: told of a request that begins on shared pages; how many of its tokens
            (``num_cached``) need not be read.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        max_batch: int,
        tree_slots: int,
        read_tokens: int = READ_TOKENS,
        shares: bool = False,
        adopt: Callable[[Request], int] = lambda request: request.num_cached,
        read_beside: int | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be >= 1")
        if read_tokens < 1:
            raise ValueError(f"read_tokens is {read_tokens}; it must be >= 1")
        self.allocator = allocator
        self.max_batch = max_batch
        self.tree_slots = tree_slots
        self.read_tokens = read_tokens
        self.read_beside = read_beside
        self.shares = shares
        self._adopt = adopt
        self.waiting: list[Request] = []  # in the order in which they are admitted
        self.running: list[Request] = []
        self._arrivals = count()
        self._keys: dict[Request, PrefixKeys] = {}
        self._published: dict[Request, int] = {}  # pages
        self._preempted: list[Request] = []
        self._deadlines: list[tuple[float, int, Request]] = []

    def pages_needed(self, request: Request) -> int:
        """Pages that a request takes at most."""
        tokens = len(request.prompt) + request.params.max_tokens + self.tree_slots
        return self.allocator.pages_for(tokens)

    def check(self, request: Request) -> None:
        """Raises ValueError if a request could not run even alone."""
        needed = self.pages_needed(request)
        if needed > self.allocator.num_pages:
            raise ValueError(
                f"the request needs {needed} K/V pages of {self.allocator.page_size} tokens "
                f"(prompt {len(request.prompt)}, max_tokens {request.params.max_tokens}, draft "
                f"tree {self.tree_slots}), the cache has {self.allocator.num_pages}; raise "
                f"num_pages or kv_memory_mb, or ask for fewer tokens"
            )

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError as `check` does."""
        self.check(request)
        request.arrival = next(self._arrivals)
        if self.shares:
            self._keys[request] = PrefixKeys(request.tokens, self.allocator.page_size)
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, request.arrival, request))
        insort(self.waiting, request, key=_rank)

    def plan(self) -> Plan:
        """Admits what there is room for and says what the next step does."""
        if self.shares:
            self._publish()
        before = len(self._preempted)
        grown = self._grow()
        admitted = self._admit() if len(self._preempted) == before else []
        preempted, self._preempted = self._preempted, []
        decode = [request for request in self.running if request.is_read]
        return Plan(preempted, grown, admitted, self._chunks(), decode)

    def preempt(self, request: Request) -> None:
        """Takes a running request's pages; it waits where it stood, and is read anew."""
        self.running.remove(request)
        self._free(request)
        request.num_preempted += 1
        insort(self.waiting, request, key=_rank)
        self._preempted.append(request)

    def expire(self, now: float) -> None:
        """Ends those whose time is over."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heappop(self._deadlines)
            request.finish_reason = request.finish_reason or "deadline"

    def retire(self) -> list[Request]:
        """Takes finished requests out of the batch and the queue, and frees their pages."""
        done = [r for r in (*self.running, *self.waiting) if r.finished]
        if done:
            if self.shares:
                self._publish()
            self.running = [r for r in self.running if not r.finished]
            self.waiting = [r for r in self.waiting if not r.finished]
            for request in done:
                self._free(request)
                self._keys.pop(request, None)
        return done

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def _grow(self) -> bool:
        """Gives those that run the pages of their next step, taking them from the last in order
        where there are too few; whether somebody got any."""
        grown = False
        for request in sorted(self.running, key=_rank):
            if not request.pages:
                continue  # it has just lost them
            missing = self._pages_now(request) - len(request.pages)
            if missing <= 0:
                continue
            while missing > self.allocator.num_free:
                last = max(self.running, key=_rank)
                self.preempt(last)
                if last is request:
                    break
            else:
                most = self.pages_needed(request) - len(request.pages)
                spare = min(SPARE_PAGES, most - missing)
                if self.allocator.num_free - missing > 2 * spare * len(self.running):
                    missing += spare
                self._give(request, self.allocator.allocate(missing))
                grown = True
        return grown

    def _pages_now(self, request: Request) -> int:
        """Pages for all tokens of a request and a draft tree behind its root."""
        return self.allocator.pages_for(len(request.tokens) - 1 + self.tree_slots)

    def _admit(self) -> list[Request]:
        """Moves waiting requests into the batch, in order; returns them.

        A page for each running request stays free, so that the new one is not the next to go.
        """
        admitted: list[Request] = []
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            shared = self._shared(request)
            missing = self._pages_now(request) - len(shared)
            left = self.allocator.num_free - self.allocator.num_idle(shared) - missing
            if left < len(self.running):
                break
            self.allocator.reuse(shared)
            self._give(request, [*shared, *self.allocator.allocate(missing)])
            request.num_cached = len(shared) * self.allocator.page_size
            if shared:
                request.num_cached = self._adopt(request)
            request.read_from = request.num_cached
            self._published[request] = len(shared)
            if request.num_preempted == 0:
                request.num_shared = request.num_cached
            del self.waiting[0]
            self.running.append(request)
            admitted.append(request)
            self._count_overtaken(request)
        return admitted

    def _count_overtaken(self, request: Request) -> None:
        overtaken = [w for w in self.waiting if w.arrival < request.arrival]
        for waiting in overtaken:
            waiting.num_overtaken += 1
        if any(waiting.num_overtaken == MAX_OVERTAKEN for waiting in overtaken):
            self.waiting.sort(key=_rank)

    def _shared(self, request: Request) -> list[int]:
        """Pages that hold the beginning of a text. One token before its root is left to be read."""
        if not self.shares:
            return []
        full = (len(request.tokens) - 2) // self.allocator.page_size
        return self.allocator.known(self._keys[request].first(max(full, 0)))

    def _publish(self) -> None:
        """Says of the full pages of running requests what they hold."""
        for request in self.running:
            if request.finish_reason == "error":
                continue
            done = self._published[request]
            full = request.num_cached // self.allocator.page_size
            if full > done:
                keys = self._keys[request].first(full)
                for page in range(done, full):
                    self.allocator.publish(request.pages[page], keys[page])
                self._published[request] = full

    def _chunks(self) -> list[Chunk]:
        unread = [request for request in self.running if not request.is_read]
        sizes = [request.unread for request in unread]
        beside = min(self.read_beside or self.read_tokens, self.read_tokens)
        shares = share_out(sizes, len(self.running), self.read_tokens, beside)
        return [_chunk(unread[place], count) for place, count in shares]

    def _give(self, request: Request, pages: list[int]) -> None:
        request.pages += pages
        request.stamps += [self.allocator.stamps[page] for page in pages]

    def _free(self, request: Request) -> None:
        self.allocator.release(request.pages)
        request.pages, request.stamps = [], []
        request.num_cached = 0
        self._published.pop(request, None)


def share_out(
    unread: Sequence[int], running: int, alone: int, beside: int
) -> list[tuple[int, int]]:
    """What a step reads: (place of a text, tokens). Short texts go first, in half of it where there
    are long ones, of which each leaves the next what it does not need.

    Where less is read beside others, so that first tokens do not wait for long texts, what is soon
    read goes first of these as well, the oldest always on, if slowly, and a step that reads short
    texts ends with its half. If all that run are long, the shortest are read, few tokens all the
    same: others may come meanwhile, and wait for the step to end.

    Args:
        unread: tokens of each text that is still to be read, the oldest first.
        running: those texts, and those that decode.
        alone, beside: tokens that are read at most: ``read_tokens``, ``read_beside``.
    """
    most = min(SHORT_READ, beside // 2)
    short = [place for place, size in enumerate(unread) if size <= most]
    long = [place for place, size in enumerate(unread) if size > most]
    if beside < alone and 0 < len(long) == running:
        return _soonest(unread, min(alone, max(2 * beside, READ_BESIDE)), max(beside // 8, 1))
    hurries = beside < alone
    budget = beside if hurries else alone
    left = budget // 2 if long else budget
    shares: dict[int, int] = {}
    for place in short:
        if unread[place] <= left:
            shares[place] = unread[place]
            left -= unread[place]
    if long and hurries:
        oldest = long[0]
        shares[oldest] = min(max(budget // 8, 1), unread[oldest])
        left = left if short else budget - shares[oldest]
        long.sort(key=unread.__getitem__)
    elif long:
        left += budget - budget // 2
    for place in long:
        count = min(unread[place] - shares.get(place, 0), left)
        if count > 0:
            shares[place] = shares.get(place, 0) + count
            left -= count
    return list(shares.items())


def _soonest(unread: Sequence[int], most: int, least: int) -> list[tuple[int, int]]:
    """As many texts as end within ``most`` tokens, and ``least`` of the oldest; of the shortest as
    much as there is room for, where none ends."""
    shares = {0: min(least, unread[0])}
    left = most - shares[0]
    by_size = sorted(range(len(unread)), key=unread.__getitem__)
    for place in by_size:
        count = unread[place] - shares.get(place, 0)
        if count > left and place != by_size[0]:
            break
        shares[place] = shares.get(place, 0) + min(count, left)
        left -= min(count, left)
    return list(shares.items())


def _chunk(request: Request, count: int) -> Chunk:
    """The next ``count`` tokens of a text, with its root where they are the last before it."""
    start = request.num_cached
    return Chunk(request, start, start + count, count == request.unread)


def _rank(request: Request) -> tuple[float, int]:
    """The order of requests: smaller ones go first."""
    if request.num_overtaken >= MAX_OVERTAKEN:
        return -math.inf, request.arrival
    return request.priority, request.arrival
