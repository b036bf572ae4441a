"""Who runs in the next step: first come, first served, within the batch and the pages there are."""

from __future__ import annotations

from collections import deque

from inferlab.scheduler.pages import PageAllocator
from inferlab.scheduler.sequence import Sequence


class Scheduler:
    """Admits waiting sequences while there is room.

    A sequence takes all the pages it can need (prompt, new tokens and one draft tree) when it is
    admitted. So a running one never runs out of pages, and one that does not fit waits.

    Args:
        allocator: the pool's pages.
        max_batch: sequences that run together at most.
        tree_slots: slots behind the committed tokens that a step's tree may fill.
    """

    def __init__(self, allocator: PageAllocator, max_batch: int, tree_slots: int) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be >= 1")
        self.allocator = allocator
        self.max_batch = max_batch
        self.tree_slots = tree_slots
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def pages_needed(self, sequence: Sequence) -> int:
        tokens = len(sequence.prompt) + sequence.params.max_tokens + self.tree_slots
        return self.allocator.pages_for(tokens)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises ValueError if it could not run even alone."""
        needed = self.pages_needed(sequence)
        if needed > self.allocator.num_pages:
            raise ValueError(
                f"the request needs {needed} K/V pages of {self.allocator.page_size} tokens "
                f"(prompt {len(sequence.prompt)}, max_tokens {sequence.params.max_tokens}, draft "
                f"tree {self.tree_slots}), the cache has {self.allocator.num_pages}; raise "
                f"num_pages or kv_memory_mb, or ask for fewer tokens"
            )
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Moves waiting sequences into the batch, in order of arrival; returns the new ones."""
        admitted = []
        while self.waiting and len(self.running) < self.max_batch:
            needed = self.pages_needed(self.waiting[0])
            if needed > self.allocator.num_free:
                break
            sequence = self.waiting.popleft()
            sequence.pages = self.allocator.allocate(needed)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def retire(self) -> list[Sequence]:
        """Takes finished sequences out of the batch and frees their pages."""
        done = [s for s in self.running if s.finished]
        if done:
            self.running = [s for s in self.running if not s.finished]
            for sequence in done:
                self.allocator.release(sequence.pages)
                sequence.pages = []
        return done

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)
