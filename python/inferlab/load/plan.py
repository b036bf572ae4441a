"""What a load is: whom it asks, what, how, and when; plain data for every client process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inferlab.load.arrivals import Arrivals
from inferlab.load.conversations import Conversation


@dataclass(frozen=True)
class TimeLimits:
    """Seconds: for a new connection, until the first token, between two reads, and in all."""

    connect_s: float = 10.0
    first_token_s: float | None = None
    stall_s: float | None = None
    total_s: float = 30.0


@dataclass(frozen=True)
class Asking:
    """A server, and the request that it gets with every turn.

    Attributes:
        url: the server's root; ``api_url`` is where its API is.
        model: None: no model is named.
        extra: further keys of every request, such as ``ignore_eos``.
        retries: how often a request is tried again, where that may help.
        retry_delay_s: before the second try, doubled for each one after; ``Retry-After`` beats it.
        proxy: the address of an HTTP proxy, which may hold a password.
    """

    url: str
    api_url: str
    endpoint: Literal["chat", "completions"]
    model: str | None
    max_tokens: int
    temperature: float
    seed: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)
    limits: TimeLimits = TimeLimits()
    retries: int = 0
    retry_delay_s: float = 1.0
    proxy: str | None = field(default=None, repr=False)

    def payload(self, messages: list[dict[str, str]], max_tokens: int | None) -> dict[str, Any]:
        """The body of a request. Text completions get the texts of all messages as one."""
        body: dict[str, Any] = {
            "max_tokens": max_tokens or self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.model is not None:
            body["model"] = self.model
        if self.seed is not None:
            body["seed"] = self.seed
        if self.endpoint == "chat":
            body["messages"] = messages
        else:
            body["prompt"] = "".join(message["content"] for message in messages)
        return {**body, **self.extra}


@dataclass(frozen=True)
class LoadPlan:
    """A load.

    Attributes:
        arrivals: when conversations begin.
        conversations: taken in order, again from the first when all were.
        count: how many are begun; None: as many as ``duration_s`` lets.
        duration_s: none begins later than that; those that run go on to their end.
        concurrency: of a closed load: its users; of an open one: how many conversations run at a
            time at most (None: any number).
        warmup: requests before, one by one, that do not count.
    """

    asking: Asking
    arrivals: Arrivals
    conversations: tuple[Conversation, ...]
    count: int | None = None
    duration_s: float | None = None
    concurrency: int | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        if not self.conversations:
            raise ValueError("conversations is empty; there must be at least one")
        if self.count is None and self.duration_s is None:
            raise ValueError("count and duration_s are None; one of them must end the load")


@dataclass(frozen=True)
class ErrorBudget:
    """How many requests may fail: a number, or a share of those sent."""

    count: int = 0
    share: float | None = None

    def holds(self, failed: int, sent: int) -> bool:
        allowed = self.count if self.share is None else self.share * sent
        return failed <= allowed

    def __str__(self) -> str:
        return str(self.count) if self.share is None else f"{self.share * 100:g}%"
