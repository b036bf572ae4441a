"""What a step gave to a request."""

from __future__ import annotations

from dataclasses import dataclass, field

from inferlab.scheduler import Request
from inferlab.types import TokenLogprobs


@dataclass(frozen=True)
class Emission:
    """New tokens of a request, or its end, or both.

    Attributes:
        request: whose they are.
        tokens: the new tokens, possibly none.
        logprobs: of each of them, where the request asks for that.
        drafted: how many of them were drafted and accepted; the others are the target's own.
        finished: whether these are the last; ``request.finish_reason`` says why.
    """

    request: Request
    tokens: list[int]
    drafted: int
    finished: bool
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request) -> Emission:
        """All that a request has and was not told of."""
        tokens = request.tokens[len(request.prompt) + request.num_told :]
        logprobs = request.logprobs[request.num_told :]
        drafted = request.num_drafted
        request.num_told += len(tokens)
        request.num_drafted = 0
        return cls(request, tokens, drafted, request.finished, logprobs)
