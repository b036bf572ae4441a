"""One request on its way through the engine: its tokens, its pages, its progress."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from inferlab.scheduler.text import StopStrings
from inferlab.types import SamplingParams, SpeculationStats


@dataclass(eq=False)
class Sequence:
    """A request's state.

    ``tokens`` are prompt and output. The newest one is the root of the next step: it is committed,
    but its K/V is not in the cache, so ``num_cached == len(tokens) - 1`` between steps.
    """

    request_id: int
    prompt: SequenceOf[int]
    params: SamplingParams
    arrived_at: float
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    timings_ms: dict[str, float] = field(default_factory=dict)
    first_token_at: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    stop_strings: StopStrings | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def remaining(self) -> int:
        """New tokens it may still produce."""
        return self.params.max_tokens - self.num_output

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
