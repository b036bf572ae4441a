"""A reply as a record, and as the mapping that `VLLMPingClient.generate` returns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from inferlab.client.answers import Answer
from inferlab.client.connection import Reply
from inferlab.records import CountedBy, Exchange, RecordJson, RequestRecord


class Asked(TypedDict):
    """What every result of `VLLMPingClient.generate` has."""

    latency_ms: float
    elapsed_ms: float
    attempts: int
    status_code: int | None
    model: str | None
    prompt: str
    endpoint: str
    record: RecordJson


class PingFailure(Asked):
    """The request failed; ``error`` says why."""

    success: Literal[False]
    error: str


class PingAnswer(Asked):
    """The request was answered."""

    success: Literal[True]
    generated_text: str
    num_tokens: int
    tokens_generated: int
    tokens_counted_by: CountedBy
    tokens_per_second: float
    prompt_tokens: int | None
    finish_reason: str | None
    raw_response: dict[str, Any]
    ttft_ms: NotRequired[float | None]
    itl_ms: NotRequired[list[float]]
    tpot_ms: NotRequired[float | None]


def request_record(
    reply: Reply[Answer], payload: Mapping[str, Any], *, prompt: str, server: str, endpoint: str
) -> RequestRecord:
    """The record of a request that has just been answered, or has just failed.

    TTFT is the time to the first chunk with text: a chunk with the role alone is none.

    Args:
        payload: what was asked.
    """
    answer = reply.value
    times: list[float] = []
    tokens, counted_by = 0, None
    if answer is not None:
        times = [(at - reply.started) * 1e3 for at in answer.text_times]
        tokens, counted_by = count_tokens(answer)
    return RequestRecord(
        source="http",
        model=payload.get("model") or (answer.model if answer is not None else None),
        prompt=prompt,
        prompt_tokens=answer.prompt_tokens if answer is not None else None,
        max_tokens=payload["max_tokens"],
        temperature=payload["temperature"],
        seed=payload.get("seed"),
        text=answer.text if answer is not None else "",
        num_tokens=tokens,
        counted_by=counted_by,
        finish_reason=answer.finish_reason if answer is not None else None,
        error=reply.error,
        started_at=time.time() - (time.perf_counter() - reply.started),
        latency_ms=reply.latency_ms,
        first_token_ms=times[0] if times else None,
        text_times_ms=times,
        exchange=Exchange(
            server=server,
            endpoint=endpoint,
            stream=bool(payload.get("stream")),
            attempts=reply.attempts,
            status_code=reply.status,
            elapsed_ms=reply.elapsed_ms,
        ),
    )


def count_tokens(answer: Answer) -> tuple[int, CountedBy]:
    """How many tokens came, and who counted them."""
    if answer.completion_tokens is not None:
        return answer.completion_tokens, "usage"
    if answer.streamed:
        return len(answer.text_times), "chunks"
    return len(answer.text.split()), "words"


def result_mapping(
    record: RequestRecord, raw_response: dict[str, Any] | None
) -> PingAnswer | PingFailure:
    """The record under the names that users know; ``raw_response`` is None where it failed."""
    r: Any = record  # the client fills the fields that may be None
    asked: Asked = {
        "latency_ms": r.latency_ms,
        "elapsed_ms": r.exchange.elapsed_ms,
        "attempts": r.exchange.attempts,
        "status_code": r.exchange.status_code,
        "model": r.model,
        "prompt": r.prompt,
        "endpoint": r.exchange.endpoint,
        "record": record.as_json(),
    }
    if raw_response is None:
        return {"success": False, "error": r.error, **asked}
    answer: PingAnswer = {
        "success": True,
        "generated_text": r.text,
        "num_tokens": r.num_tokens,
        "tokens_generated": r.num_tokens,
        "tokens_counted_by": r.counted_by,
        "tokens_per_second": r.tokens_per_second,
        "prompt_tokens": r.prompt_tokens,
        "finish_reason": r.finish_reason,
        **asked,
        "raw_response": raw_response,
    }
    if r.exchange.stream:
        answer["ttft_ms"] = r.first_token_ms
        answer["itl_ms"] = r.itl_ms
        answer["tpot_ms"] = r.tpot_ms
    return answer
