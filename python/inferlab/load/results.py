"""From an answer to the record of its request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from inferlab.client.answers import usage_count
from inferlab.load.acceptance import acceptance_of_answer
from inferlab.load.conversations import Conversation
from inferlab.load.plan import Asking
from inferlab.load.reading import Reading
from inferlab.load.session import Attempt
from inferlab.records import CountedBy, Exchange, InLoad, RequestRecord


@dataclass(frozen=True)
class Clock:
    """Unix time, going on by the monotonic clock from where it stood at one moment.

    ``time.perf_counter_ns()`` is one clock for all processes of a machine, so that times of several
    client processes with one such pair can be compared.
    """

    unix_s: float
    at_ns: int

    @staticmethod
    def now() -> Clock:
        return Clock(time.time(), time.perf_counter_ns())

    def unix(self, stamp_ns: int) -> float:
        """Unix time in seconds at a stamp of the monotonic clock."""
        return self.unix_s + (stamp_ns - self.at_ns) / 1e9


@dataclass(frozen=True)
class Shard:
    """Which part of a load a client process is: every ``of``-th conversation from ``index`` on."""

    clock: Clock
    index: int = 0
    of: int = 1


@dataclass(frozen=True)
class Place:
    """Where in a load a request stands.

    Attributes:
        scheduled_ns: when it was to be sent; ``first_ns``: when its first try was.
        tries: in all.
    """

    number: int
    turn: int
    conversation: Conversation
    scheduled_ns: int
    first_ns: int
    tries: int


def request_record(
    attempt: Attempt, asking: Asking, payload: Mapping[str, Any], place: Place, part: Shard
) -> RequestRecord:
    """The record of a request that has just ended. Its times are those of the last try.

    ``latency_ms`` is to the last chunk with content or reasoning, as the last token is then there;
    to the last byte where there was none, and to the failure of what failed.
    """
    reading, failure = attempt.reading, attempt.failure
    started = attempt.started_ns

    def since(stamp_ns: int | None) -> float | None:
        return None if stamp_ns is None else (stamp_ns - started) / 1e6

    times = [(stamp - started) / 1e6 for stamp in reading.text_ns]
    end_ms = (attempt.ended_ns - started) / 1e6
    last_byte_ms = since(reading.last_ns)
    if failure is not None:
        latency_ms = end_ms
    else:
        latency_ms = times[-1] if times else last_byte_ms or end_ms
    usage = {"usage": reading.usage}
    counted = reading.completion_tokens
    counted_by: CountedBy | None = "usage" if counted is not None else "chunks" if times else None
    warnings = list(reading.warnings) if failure is None else []
    if place.tries > 1:
        warnings.append("retried")
    return RequestRecord(
        source="http",
        model=asking.model or reading.model,
        prompt=place.conversation.turns[place.turn].text,
        prompt_tokens=usage_count(usage, "prompt_tokens"),
        max_tokens=payload["max_tokens"],
        temperature=payload["temperature"],
        seed=payload.get("seed"),
        text=reading.text,
        num_tokens=counted if counted is not None else len(times),
        counted_by=counted_by,
        finish_reason=reading.finish_reason,
        error=None if failure is None else _without(str(failure), asking.api_key),
        started_at=part.clock.unix(started),
        latency_ms=latency_ms,
        first_token_ms=times[0] if times else None,
        text_times_ms=times,
        exchange=Exchange(
            server=asking.url,
            endpoint=asking.endpoint,
            stream=True,
            attempts=place.tries,
            status_code=attempt.status,
            elapsed_ms=(attempt.ended_ns - place.first_ns) / 1e6,
            load=InLoad(
                scheduled_at=part.clock.unix(place.scheduled_ns),
                sent_at=part.clock.unix(place.first_ns),
                conversation=place.number,
                turn=place.turn,
                category=place.conversation.category,
                process=part.index,
                failure=None if failure is None else failure.kind,
                warnings=warnings,
                retry_after_s=attempt.retry_after_s,
                connect_ms=attempt.connect_ms,
                first_content_ms=since(reading.first_content_ns),
                chunk_tokens=reading.chunk_tokens,
                end_ms=last_byte_ms,
                acceptance=_acceptance(reading),
            ),
        ),
    )


def _acceptance(reading: Reading) -> dict[str, Any] | None:
    told = (acceptance_of_answer(event) for event in reversed(reading.events))
    found = next((one for one in told if one is not None), None)
    return None if found is None else asdict(found)


def _without(text: str, secret: str | None) -> str:
    return text.replace(secret, "[api key]") if secret else text
