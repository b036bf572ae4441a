"""Who runs in the next step: first come, first served, within the batch and the pages there are."""

from __future__ import annotations

from collections import deque

from inferlab.scheduler.pages import PageAllocator
from inferlab.scheduler.plan import Chunk, Plan
from inferlab.scheduler.request import Request

READ_TOKENS = 512
"""Tokens that a step reads at most, of all texts together."""


class Scheduler:
    """Plans steps.

    A request takes all the pages it can need (prompt, new tokens and one draft tree) when it is
    admitted. So a running one never runs out of pages, and one that does not fit waits. Texts are
    read in order of arrival; each gets a token from the step on that completes its reading.

    Args:
        allocator: the pool's pages.
        max_batch: requests that run together at most.
        tree_slots: slots behind the committed tokens that a step's tree may fill.
        read_tokens: tokens that a step reads at most, roots not counted.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        max_batch: int,
        tree_slots: int,
        read_tokens: int = READ_TOKENS,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be >= 1")
        if read_tokens < 1:
            raise ValueError(f"read_tokens is {read_tokens}; it must be >= 1")
        self.allocator = allocator
        self.max_batch = max_batch
        self.tree_slots = tree_slots
        self.read_tokens = read_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._preempted: list[Request] = []

    def pages_needed(self, request: Request) -> int:
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
        self.waiting.append(request)

    def plan(self) -> Plan:
        """Admits what there is room for and says what the next step does."""
        preempted, self._preempted = self._preempted, []
        admitted = self._admit()
        chunks, decode = [], []
        left = self.read_tokens
        for request in self.running:
            if request.is_read:
                decode.append(request)
                continue
            count = min(request.unread, left)
            root = count == request.unread
            if root or count > 0:
                start = request.num_cached
                chunks.append(Chunk(request, start, start + count, root))
                left -= count
        return Plan(preempted, admitted, chunks, decode)

    def preempt(self, request: Request) -> None:
        """Takes a running request's pages; it is the next to be admitted, and reads all anew."""
        self.running.remove(request)
        self._free(request)
        self.waiting.appendleft(request)
        self._preempted.append(request)

    def retire(self) -> list[Request]:
        """Takes finished requests out of the batch and the queue, and frees their pages."""
        done = [r for r in (*self.running, *self.waiting) if r.finished]
        if done:
            self.running = [r for r in self.running if not r.finished]
            self.waiting = deque(r for r in self.waiting if not r.finished)
            for request in done:
                self._free(request)
        return done

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def _admit(self) -> list[Request]:
        """Moves waiting requests into the batch, in order of arrival; returns them."""
        admitted = []
        while self.waiting and len(self.running) < self.max_batch:
            needed = self.pages_needed(self.waiting[0])
            if needed > self.allocator.num_free:
                break
            request = self.waiting.popleft()
            request.pages = self.allocator.allocate(needed)
            self.running.append(request)
            admitted.append(request)
        return admitted

    def _free(self, request: Request) -> None:
        self.allocator.release(request.pages)
        request.pages = []
        request.num_cached = 0
