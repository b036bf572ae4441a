"""What a replica's steps take, from a cost model and what a server adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from inferlab.errors import UsageError
from inferlab.specdec.costs import CostModel


@dataclass(frozen=True)
class Overhead:
    """What a server adds, which a cost model knows nothing of.

    Attributes:
        scale: what times of the cost model are multiplied with.
        step_ms: of each step.
        row_ms: of each sequence that gets tokens in a step.
        request_ms: of each request, when it is read.
        latency_ms: between a client and a replica, both ways together; it keeps no replica busy.
    """

    scale: float = 1.0
    step_ms: float = 0.0
    row_ms: float = 0.0
    request_ms: float = 0.0
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.scale <= 0 or min(self.step_ms, self.row_ms, self.request_ms, self.latency_ms) < 0:
            raise UsageError("overhead: times must not be negative, and the scale above 0")


NO_OVERHEAD = Overhead()


def _as_it_is(batch: float) -> float:
    return 1.0


class Prices:
    """Times of steps.

    Args:
        costs: of a model and its drafter.
        nodes: from levels to the draft nodes that are verified for a sequence; None: as many.
        overhead: what comes on top.
        step_scale, draft_scale, reading_scale: by batch, what the model's times are multiplied with
            (see `inferlab.specdec.replay_times.Times`).
    """

    def __init__(
        self,
        costs: CostModel,
        nodes: Callable[[int], float] | None = None,
        overhead: Overhead = NO_OVERHEAD,
        step_scale: Callable[[float], float] = _as_it_is,
        draft_scale: Callable[[float], float] = _as_it_is,
        reading_scale: Callable[[float], float] = _as_it_is,
    ) -> None:
        self.costs, self.overhead = costs, overhead
        self._nodes = nodes or float
        self._step_scale, self._draft_scale = step_scale, draft_scale
        self._reading_scale = reading_scale
        self._lines: dict[tuple[int, int], tuple[float, float]] = {}
        reading = costs.draft.reading or ((0, 0.0),)
        self._drafter_reading: tuple[tuple[float, ...], tuple[float, ...]] = tuple(
            zip(*reading, strict=True)
        )  # type: ignore[assignment]
        self.drafter_reads = max(self._drafter_reading[1]) > 0

    def line(self, batch: int, levels: int) -> tuple[float, float]:
        """Of a decoding step: ms behind no context, and for each token of it."""
        key = batch, levels
        if key not in self._lines:
            nodes = self._nodes(levels) if levels > 0 else 0.0
            scale = self.overhead.scale
            behind = [self.costs.verify_ms(batch, nodes, context) for context in (0, 1024)]
            first, second = (ms * float(self._step_scale(batch)) * scale for ms in behind)
            drafting = self.costs.draft.ms(batch, nodes) * float(self._draft_scale(batch)) * scale
            added = self.overhead.step_ms + batch * self.overhead.row_ms
            self._lines[key] = first + drafting + added, (second - first) / 1024
        return self._lines[key]

    def decode_ms(self, batch: int, levels: int, context: float) -> float:
        """A step that drafts so many levels for each sequence."""
        first, slope = self.line(batch, levels)
        return first + slope * context

    def read_ms(self, texts: int, tokens: int, context: float, ended: int = 0) -> float:
        """Reading parts of texts, of so many tokens together, each of which sees ``context``.

        Args:
            ended: texts that are read to their end, and get their first token.
        """
        ms = self.costs.reading_ms(texts, max(tokens, texts), context)
        ms *= float(self._reading_scale(texts)) * self.overhead.scale
        each = self.overhead.request_ms + self.overhead.row_ms
        return ms + self.overhead.step_ms + ended * each

    def drafter_ms(self, tokens: int) -> float:
        """What a draft model takes to read texts of so many tokens before it first drafts."""
        sizes, times = self._drafter_reading
        return float(np.interp(tokens, sizes, times)) * self.overhead.scale
