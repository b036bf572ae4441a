"""One request on its way through the engine: its tokens, its pages, its progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from inferlab.scheduler.constraint import Constraint
from inferlab.types import SamplingParams, SpeculationStats, TokenLogprobs


@dataclass(eq=False)
class Request:
    """A prompt to go on from, and the state of its decoding.

    ``tokens`` are prompt and output. The newest one is the root of the next step: it is committed,
    but its K/V is not in the cache. All before it are to be read first: of a new request the
    prompt's, of one that was preempted its output as well.

    Attributes:
        forced: new tokens that are not chosen, by their place: only the last possible one, or the
            first behind a prompt of one token.
        constraint: what restricts its new tokens; of this request alone.
        stamps: of its pages, when they were handed out (see `PageAllocator`).
        num_cached: tokens whose K/V is in the pages; ``len(tokens) - 1`` between two steps once all
            is read.
        read_from: where its reading began: what lies before was in shared pages.
        read_length: tokens of the text that `generate` reads in one forward: the prompt, or more
            where a model reads the text anew (``TargetModel.reread_length``).
        finish_reason: why it ended: "length", "stop" (an end token), "stop_string", "error" (see
            ``error``), "interrupted", "aborted", "deadline"; None before.
        text: what the new tokens add to the prompt's text, once it has ended.
        max_draft: levels drafted for it in a step at most; 0: none ever; None: what there is.
        acceptance: name and threshold of its own acceptance policy; None: the engine's.
        predicted: tokens that its text may have much of; drafters that look texts up draft from it.
        logprobs: of each new token, where its parameters ask for them.
        priority: those of a smaller number go first.
        deadline: when it ends, by `time.perf_counter`, finished or not; None: never.
        arrival: its place in the order in which requests came.
        num_overtaken: requests that came later and were admitted before.
        num_shared: tokens of the prompt whose K/V was there already when it was first admitted.
        num_preempted: how often it lost its pages.
        num_told: new tokens that were handed out.
        num_drafted: of those that were not, how many were drafted.
    """

    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    forced: Mapping[int, int] = field(default_factory=dict)
    constraint: Constraint | None = None
    max_draft: int | None = None
    acceptance: tuple[str, float] | None = None
    predicted: list[int] = field(default_factory=list)
    priority: int = 0
    deadline: float | None = None
    request_id: int = -1
    arrived_at: float = 0.0
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)
    num_cached: int = 0
    read_from: int = 0
    read_length: int = 0
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    timings_ms: dict[str, float] = field(default_factory=dict)
    first_token_at: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    text: str | None = None
    arrival: int = -1
    num_overtaken: int = 0
    num_shared: int = 0
    num_preempted: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_told: int = 0
    num_drafted: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.read_length = len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def unread(self) -> int:
        """Tokens before the root whose K/V is missing."""
        return len(self.tokens) - 1 - self.num_cached

    @property
    def is_read(self) -> bool:
        """Whether it has been decoded: the root of a text of one token has nothing before it."""
        return self.unread == 0 and self.num_cached > 0

    @property
    def remaining(self) -> int:
        """New tokens it may still produce."""
        return self.params.max_tokens - self.num_output

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
