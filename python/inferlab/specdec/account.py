"""What drafting may cost before it is known to pay."""

from __future__ import annotations

from collections.abc import Sequence


class Account:
    """Of the time, in ms, that was lost against decoding plainly.

    New sequences are new luck: each brings its part of ``FIRST`` plain steps and takes what was
    left of the ones before. ``SHARE`` of all time is added, and what drafts gained, up to
    ``SAVINGS`` plain steps.
    """

    FIRST, SHARE, SAVINGS = 1.2, 0.004, 4.0
    RISK = 0.15  # of what drafting is expected to save, that may be lost before it is given up
    STAKE = 0.5  # of what may be lost, by one step; all of it with the smallest drafts

    def __init__(self) -> None:
        self.ms = 0.0
        self.credit = 0.0
        """What may be lost beyond it, since so much is expected to be gained."""
        self._newest = -1  # the last request that was seen

    def knows(self, requests: Sequence[int]) -> bool:
        """Whether none of these is new."""
        return max(requests) <= self._newest

    def admit(self, requests: Sequence[int], plain_ms: float) -> None:
        """Before a step with these sequences, which takes so long plainly."""
        self.ms = min(self.ms, self.SAVINGS * plain_ms)
        new = sum(request > self._newest for request in requests) / len(requests)
        if new:
            self._newest = max(requests)
            self.ms += new * (self.FIRST * plain_ms - self.ms)

    def expect(self, saved_ms: float, size: int, certainty: float) -> None:
        """So much is expected to be saved until a batch of that size has ended: a part of it may be
        lost first. The more sequences, the less it takes to tell luck from the lack of it."""
        self.credit = max(self.RISK * certainty * saved_ms / size, 0.0)

    def passed(self, ms: float) -> None:
        """So much time went by."""
        self.ms += self.SHARE * ms

    def may_lose(self, smallest: bool) -> float:
        """By one step, ``smallest``: with as little drafted as can be."""
        return max(self.ms + self.credit, 0.0) * (1.0 if smallest else self.STAKE)
