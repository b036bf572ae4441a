"""One request over HTTP: sent, read with a stamp at every read, ended by its limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import aiohttp
import httpx

from inferlab.client.answers import error_text
from inferlab.client.connection import parse_retry_after
from inferlab.client.ping import PATHS
from inferlab.client.proxies import certificates
from inferlab.load.failures import RETRYABLE, RequestFailure, classify
from inferlab.load.plan import Asking
from inferlab.load.reading import Reading, names_model
from inferlab.load.stamped import StampedConnector, StampedResponse

T = TypeVar("T")

_ANSWERS = ("text/event-stream", "application/json", "application/octet-stream")
"""What answers are sent as; the last is what nothing said becomes."""

IDLE_S = 2.0
"""How long a connection waits to be used again: less than servers wait before they close it."""

_AFTER_DONE_S = 1.0
"""How long the end of a body may lag behind its ``[DONE]`` before the connection is given up."""


@dataclass
class Attempt:
    """One try of a request. Times are ``time.perf_counter_ns()``."""

    started_ns: int
    reading: Reading = field(default_factory=Reading)
    status: int | None = None
    connect_ms: float | None = None
    retry_after_s: float | None = None
    failure: RequestFailure | None = None
    ended_ns: int = 0

    @property
    def retryable(self) -> bool:
        if self.failure is None:
            return False
        status = self.status or 0
        return self.failure.kind in RETRYABLE or (
            self.failure.kind == "http_status" and (status == 429 or status >= 500)
        )


class LoadSession:
    """The connections of a client process to its server; an async context manager.

    Connections are kept alive, as many as are needed. Certificates are verified.

    Raises:
        ValueError: certificates that cannot be read; names the variable of the environment.
    """

    def __init__(self, asking: Asking) -> None:
        self.asking = asking
        self._url = asking.api_url + PATHS[asking.endpoint]
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if asking.api_key:
            self._headers["Authorization"] = f"Bearer {asking.api_key}"
        speaks_tls = "https" in (httpx.URL(asking.url).scheme, (asking.proxy or "").split(":")[0])
        self._tls: Any = certificates() if speaks_tls else True

    async def __aenter__(self) -> LoadSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_start.append(_connecting)
        trace.on_connection_create_end.append(_connected)
        self._http = aiohttp.ClientSession(
            connector=StampedConnector(limit=0, keepalive_timeout=IDLE_S, ssl=self._tls),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.asking.limits.connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            response_class=StampedResponse,
            trace_configs=[trace],
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def ask(self, payload: dict[str, Any]) -> Attempt:
        """One try. What goes wrong is its ``failure``; cancelled, it is "interrupted" and holds
        what came until then."""
        body = json.dumps(payload, ensure_ascii=False).encode("utf-8", "backslashreplace")
        attempt = Attempt(time.perf_counter_ns())
        try:
            await self._exchange(body, attempt)
        except asyncio.CancelledError:
            attempt.failure = RequestFailure("interrupted", "interrupted by Ctrl-C")
        except Exception as error:
            attempt.failure = classify(error, answering=attempt.status is not None)
        attempt.ended_ns = time.perf_counter_ns()
        return attempt

    async def _exchange(self, body: bytes, attempt: Attempt) -> None:
        limits = self.asking.limits
        clock = _Deadlines(attempt.started_ns, limits.total_s, limits.first_token_s, limits.stall_s)
        response: Any = await clock.wait(
            self._http.post(
                self._url, data=body, proxy=self.asking.proxy, allow_redirects=False,
                trace_request_ctx=attempt,
            ),
            attempt.reading,
        )  # fmt: skip
        attempt.status = response.status
        try:
            if response.status == 200:
                await self._read(response, attempt, clock)
            else:
                refusal = await clock.wait(response.read(), attempt.reading)
                attempt.retry_after_s = parse_retry_after(response.headers.get("Retry-After"))
                raise RequestFailure("http_status", _refusal(response, refusal))
        finally:
            response.close()  # nothing, where the body was read to its end

    async def _read(self, response: StampedResponse, attempt: Attempt, clock: _Deadlines) -> None:
        reading = attempt.reading
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        def take(chunk: bytes, stamp_ns: int) -> None:
            reading.feed(chunk, stamp_ns)
            if reading.failure is not None or reading.done:
                end()

        body = response.stamped
        body.attach(take, end)
        await clock.wait(ended, reading)
        if reading.failure is None and body.problem is not None and not reading.done:
            raise body.problem
        if reading.done and not response.content.is_eof():
            with contextlib.suppress(Exception):  # the answer stands; its connection does not
                await asyncio.wait_for(response.content.wait_eof(), _AFTER_DONE_S)
        reading.finish()
        if reading.failure is not None:
            kind = response.content_type
            if kind not in _ANSWERS and not reading.text_ns:
                raise RequestFailure(
                    "malformed_json", f"the answer is {kind}, neither events nor JSON"
                )
            raise reading.failure
        if not names_model(reading.model, self.asking.model):
            raise RequestFailure(
                "wrong_model", f"{reading.model!r} answered, {self.asking.model!r} was asked"
            )


class _Deadlines:
    """When a request is given up: in all, before its first token, and between two reads."""

    def __init__(
        self, started_ns: int, total_s: float, first_token_s: float | None, stall_s: float | None
    ) -> None:
        self._started_ns = started_ns
        self._total_s, self._first_token_s, self._stall_s = total_s, first_token_s, stall_s

    def next(self, reading: Reading) -> tuple[float, str]:
        """(seconds from the start at which it is given up, the class that this would be)."""
        ends = [(self._total_s, "timeout")]
        if not reading.text_ns:
            if self._first_token_s is not None:
                ends.append((self._first_token_s, "first_token_timeout"))
        elif self._stall_s is not None and reading.last_ns is not None:
            since_start = (reading.last_ns - self._started_ns) / 1e9
            ends.append((since_start + self._stall_s, "stall"))
        return min(ends)

    async def wait(self, awaited: Awaitable[T], reading: Reading) -> T:
        """What ``awaited`` gives; where anything else comes first, it is cancelled.

        Raises:
            RequestFailure: a limit came first.
        """
        future = asyncio.ensure_future(awaited)
        try:
            while not future.done():
                end_s, kind = self.next(reading)
                left_s = end_s - (time.perf_counter_ns() - self._started_ns) / 1e9
                if left_s <= 0:
                    raise RequestFailure(kind, f"given up after {end_s:.3g} s ({_SAID[kind]})")
                if self._stall_s is not None:  # of a token that comes meanwhile
                    left_s = min(left_s, self._stall_s)
                await asyncio.wait({future}, timeout=left_s)
        finally:
            future.cancel()  # nothing, where it is done
        return future.result()


_SAID = {
    "timeout": "not at its end",
    "first_token_timeout": "no token had come",
    "stall": "nothing more came",
}


def _refusal(response: aiohttp.ClientResponse, body: bytes) -> str:
    said = error_text(body)
    if 300 <= response.status < 400:
        said = f"redirected to {response.headers.get('Location')}; give that address as base_url"
    later = response.headers.get("Retry-After")
    wait = f" (Retry-After: {later})" if later else ""
    return f"HTTP {response.status}: {said or response.reason}{wait}"


async def _connecting(_: Any, context: SimpleNamespace, __: Any) -> None:
    context.begun_ns = time.perf_counter_ns()


async def _connected(_: Any, context: SimpleNamespace, __: Any) -> None:
    attempt: Attempt = context.trace_request_ctx
    attempt.connect_ms = (time.perf_counter_ns() - context.begun_ns) / 1e6
