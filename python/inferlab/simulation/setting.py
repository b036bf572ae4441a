"""What is compared: how many replicas, who gets what, how each of them decodes."""

from __future__ import annotations

from dataclasses import dataclass

from inferlab.errors import UsageError
from inferlab.scheduler import READ_TOKENS

PAYS = "pays"
"""As many levels as the cost model says to pay, by batch."""
ROUTINGS = ("round-robin", "least-loaded", "two-choices", "prefix")


@dataclass(frozen=True)
class Setting:
    """A policy.

    Attributes:
        replicas: that decode, each with its own pages and queue.
        routing: of `ROUTINGS`.
        levels: that are drafted in each step; `PAYS`; 0: plain decoding.
        max_k: of `PAYS`.
        max_batch, read_tokens, read_beside, pages, page_size, shares: of each replica, see
            `inferlab.scheduler.Scheduler`; ``pages`` None: twice as many as a full batch needs;
            ``read_beside`` None: as servers have it, by the cost model.
        tree_slots: slots that a step's tree may fill; None: as many as ``levels`` need.
        bound: of "prefix": a replica takes a group's requests up to so many times the mean load.
    """

    replicas: int = 1
    routing: str = "least-loaded"
    levels: int | str = 0
    max_k: int = 8
    max_batch: int = 32
    read_tokens: int = READ_TOKENS
    read_beside: int | None = None
    pages: int | None = None
    page_size: int = 16
    shares: bool = True
    tree_slots: int | None = None
    bound: float = 1.25

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise UsageError(
                f"routing: {self.routing!r} is unknown; known are {', '.join(ROUTINGS)}"
            )
        for name in ("replicas", "max_batch", "read_tokens", "read_beside", "pages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: {value} is not allowed; must be >= 1")
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise UsageError(f"page_size: {self.page_size} is not allowed; must be a power of two")
        if isinstance(self.levels, str) and self.levels != PAYS:
            raise UsageError(f"K: {self.levels!r} is unknown; give a number, or {PAYS}")
        if self.bound <= 1:
            raise UsageError(f"bound: {self.bound} is not allowed; must be above 1")

    @property
    def slots(self) -> int:
        """Of a step's tree, its root included."""
        if self.tree_slots is not None:
            return self.tree_slots
        return 1 + (self.max_k if isinstance(self.levels, str) else self.levels)

    def __str__(self) -> str:
        kind = "plain" if self.levels == 0 else f"K {self.levels}"
        return f"{self.replicas} x {kind}, batch {self.max_batch}, {self.routing}"
