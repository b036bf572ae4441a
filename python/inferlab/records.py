"""One record of every request, however it was decoded.

The engine, Hugging Face's `generate` and the HTTP client all fill it. The mappings that they return
are views of it under the names that users know; each carries its record, as JSON types, as
``record``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import GetCoreSchemaHandler, TypeAdapter
from typing_extensions import TypedDict

from inferlab.types import SpeculationStats

Source = Literal["specdec", "baseline", "generate", "http"]
CountedBy = Literal["ids", "usage", "chunks", "words"]


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Who drafted for a request, who accepted, and how often: counts, from which rates follow."""

    impl: str  # "hf" or "fake"
    draft_mode: str
    draft_model: str | None
    policy: dict[str, Any]
    controller: dict[str, Any]
    lossless: bool
    stats: SpeculationStats


@dataclass(frozen=True, kw_only=True)
class InLoad:
    """A request's place in a load, and what its stream showed.

    Attributes:
        scheduled_at: Unix time in seconds at which it was to be sent: by the arrivals, or, for a
            later turn and in a closed loop, when what it waited for had ended.
        sent_at: when its first try was sent; ``started_at`` is of the last one.
        conversation, turn: which of the load's conversations, and which turn of it, from 0.
        process: which client process sent it.
        failure: the class of ``error``, a key of `inferlab.load.failures.FAILURES`.
        warnings: keys of `inferlab.load.failures.WARNINGS`.
        retry_after_s: what the server asked for when it refused.
        connect_ms: of a new connection, from the name's look-up to the end of the TLS handshake;
            None where a connection was used again.
        first_content_ms: to the first chunk with content; `RequestRecord.first_token_ms` is to the
            first with reasoning or content.
        chunk_tokens: new tokens in each chunk of ``text_times_ms``; None where chunks do not tell.
        end_ms: to the last byte; ``latency_ms`` is to the last chunk with text, where there is one.
        acceptance: what the server says of speculation for this request.
    """

    scheduled_at: float
    sent_at: float
    conversation: int
    turn: int
    category: str | None = None
    process: int = 0
    failure: str | None = None
    warnings: list[str] = field(default_factory=list)
    retry_after_s: float | None = None
    connect_ms: float | None = None
    first_content_ms: float | None = None
    chunk_tokens: list[int] | None = None
    end_ms: float | None = None
    acceptance: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How a request went over HTTP.

    Attributes:
        attempts: tries in all; the record's times are those of the last one.
        elapsed_ms: all attempts and the waits between them.
        load: where the request was one of a load (`inferlab.load`).
    """

    server: str
    endpoint: str
    stream: bool
    attempts: int
    status_code: int | None
    elapsed_ms: float
    load: InLoad | None = None


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """What was asked, what came of it, when, and what was counted on the way.

    Attributes:
        version: of this type; grows when a name changes its meaning or goes.
        source: who decoded: the engine, the local baseline, `generate` beside the engine, a server.
        model, device, dtype: of the target; None where a server does not tell.
        prompt: None where token ids were given.
        text: what follows the prompt.
        token_ids: the new ones; None where only their text is known.
        num_tokens: new tokens, as counted by their ids, by the server's usage, by the chunks of a
            stream, or by words, an estimate; ``counted_by`` is None where nothing came.
        finish_reason: "length", "stop", "stop_string", "interrupted", "error", or a server's word.
        error: why the request failed.
        started_at: Unix time in seconds; latency, first token and texts are told from then on.
        latency_ms: until the last token (the last byte of an answer).
        first_token_ms: until the first token (the first text of a stream); None where not seen.
        text_times_ms: of each chunk of a stream that had text.
        timings_ms: by phase of the engine.
        rss_mb: resident memory of this process at the end.
        speculation: of the engine only.
        exchange: of HTTP only.
    """

    version: Literal[1] = 1
    source: Source
    model: str | None
    device: str | None = None
    dtype: str | None = None
    prompt: str | None = None
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    text: str = ""
    token_ids: list[int] | None = None
    num_tokens: int = 0
    counted_by: CountedBy | None = None
    finish_reason: str | None = None
    error: str | None = None
    started_at: float
    latency_ms: float
    first_token_ms: float | None = None
    text_times_ms: list[float] = field(default_factory=list)
    timings_ms: dict[str, float] = field(default_factory=dict)
    rss_mb: float | None = None
    speculation: Speculation | None = None
    exchange: Exchange | None = None

    def as_json(self) -> RecordJson:
        """The record as JSON types; :func:`record_of` makes a record of it again."""
        # dataclasses.asdict copies each token: half a millisecond for every request.
        mapping = dict(vars(self))
        if self.speculation is not None:
            stats = dict(vars(self.speculation.stats))
            mapping["speculation"] = {**vars(self.speculation), "stats": stats}
        if self.exchange is not None:
            mapping["exchange"] = dict(vars(self.exchange))
            if self.exchange.load is not None:
                mapping["exchange"]["load"] = dict(vars(self.exchange.load))
        return mapping

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole latency; 0 where there was none."""
        return tokens_per_second(self.num_tokens, self.latency_ms)

    @property
    def itl_ms(self) -> list[float]:
        """Times between chunks with text: the first token is not among them."""
        return [later - sooner for sooner, later in pairwise(self.text_times_ms)]

    @property
    def tpot_ms(self) -> float | None:
        """From the first text to the last, per token behind the first; None where all came at
        one time."""
        times = self.text_times_ms
        spread = len(times) > 1 and self.num_tokens > 1
        return (times[-1] - times[0]) / (self.num_tokens - 1) if spread else None


class _RecordInJson:
    """Tells pydantic that a mapping is a record."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(RequestRecord)


RecordJson = Annotated[dict[str, Any], _RecordInJson]
"""A record as JSON types."""


class BaselineResult(TypedDict):
    """See `LocalBaselineRunner.run`."""

    text: str
    completion: str
    token_ids: list[int]
    num_tokens: int
    latency_ms: float
    tokens_per_second: float
    tokens_per_sec: float
    prompt: str
    max_new_tokens: int
    finish_reason: str
    model: str
    device: str
    dtype: str
    temperature: float
    seed: int
    record: RecordJson


def record_of(result: Mapping[str, Any]) -> RequestRecord:
    """The record that a result holds.

    Raises:
        ValueError: it is not one, or one of another version.
    """
    return _reader().validate_python(result["record"])


@functools.cache
def _reader() -> TypeAdapter[RequestRecord]:
    return TypeAdapter(RequestRecord)  # takes milliseconds to make


def tokens_per_second(num_tokens: int, ms: float) -> float:
    """Tokens over time; 0 where that is none."""
    return num_tokens / (ms / 1e3) if ms > 0 else 0.0


def total_stats(records: Iterable[RequestRecord]) -> SpeculationStats:
    """What speculation did for all of these, counts added up."""
    total = SpeculationStats()
    for record in records:
        if record.speculation is not None:
            total.add(record.speculation.stats)
    return total
