"""Requests to an OpenAI-compatible server: address, key, deadline, useful retries."""

from __future__ import annotations

import email.utils
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from inferlab.client.answers import AnswerError, error_text
from inferlab.client.proxies import check_port, client_for, settle_zone
from inferlab.types import check_text

logger = logging.getLogger(__name__)

T = TypeVar("T")
Reader = Callable[[Iterator[bytes]], T]

MAX_RETRY_WAIT_S = 60.0
"""A server that asks (``Retry-After``) to wait longer than this is not waited for."""


@dataclass
class Reply(Generic[T]):
    """What came of a request.

    Attributes:
        value: what the reader made of the body; None if and only if ``error`` says why.
        status: HTTP status of the last attempt, None where none came.
        started: ``time.perf_counter()`` when the last attempt was sent.
        latency_ms: the last attempt, from sending to the last byte.
        elapsed_ms: all attempts and the waits between them.
    """

    value: T | None = None
    error: str | None = None
    status: int | None = None
    attempts: int = 1
    started: float = 0.0
    latency_ms: float = 0.0
    elapsed_ms: float = 0.0
    retryable: bool = False
    retry_after_s: float | None = None


class OpenAIConnection:
    """Sends requests to one server, one at a time or from several threads.

    Connect errors, 429 and 5xx are tried again, ``retry_delay`` seconds later, then twice that, and
    so on, or when the server's ``Retry-After`` says. A connection that breaks before any byte of an
    answer counts as a connect error: servers close idle connections as the next request is on its
    way. All other failures are final: a slow request may be running still, and a 4xx will not get
    better.

    Args:
        base_url: ``http(s)://host[:port][/path]``; see :func:`split_base_url`.
        api_key: sent as a bearer token; it stands in no log, message or repr.
        timeout: seconds for one attempt, from connecting to the last byte.
        attempts: tries in all, >= 1.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout: float,
        attempts: int,
        retry_delay: float,
    ) -> None:
        self.root_url, self.api_url = split_base_url(base_url)
        self.timeout = timeout
        self.attempts = attempts
        self.retry_delay = retry_delay
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise ValueError("api_key must be printable ASCII without spaces")
        self._api_key = api_key
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        url = httpx.URL(self.root_url)
        if "%" in url.host:  # a zone means nothing to the other side (RFC 6874)
            headers["Host"] = re.sub(r"%[^\]]*", "", url.netloc.decode())
        self._http, proxy = client_for(url, headers, timeout)
        self._route = self.root_url + (f" by the proxy of {proxy}" if proxy else "")

    def request(
        self,
        method: str,
        url: str,
        read: Reader[T],
        payload: dict[str, Any] | None = None,
        *,
        attempts: int | None = None,
        timeout: float | None = None,
    ) -> Reply[T]:
        """Sends a request and reads its answer, with retries. Never raises for what went wrong.

        Args:
            read: makes a value of the body's chunks, or raises AnswerError.
            attempts, timeout: instead of the connection's own.
        """
        attempts = attempts or self.attempts
        timeout = timeout or self.timeout
        begun = time.perf_counter()
        attempt = 0
        while True:
            attempt += 1
            reply = self._attempt(method, url, read, payload, timeout)
            if reply.error is None or not reply.retryable or attempt >= attempts:
                break
            wait = self.retry_delay * 2 ** (attempt - 1)
            if reply.retry_after_s is not None:
                wait = reply.retry_after_s
            if wait > MAX_RETRY_WAIT_S:
                reply.error += f"; not tried again: the next try would be in {wait:.0f} s"
                break
            logger.warning(
                "attempt %d of %d failed: %s; trying again in %.1f s",
                attempt, attempts, reply.error, wait,
            )  # fmt: skip
            time.sleep(wait)
        reply.attempts = attempt
        reply.elapsed_ms = (time.perf_counter() - begun) * 1e3
        return reply

    def close(self) -> None:
        self._http.close()

    def _attempt(
        self,
        method: str,
        url: str,
        read: Reader[T],
        payload: dict[str, Any] | None,
        timeout: float,
    ) -> Reply[T]:
        reply: Reply[T] = Reply(started=time.perf_counter())
        try:
            with self._http.stream(method, url, json=payload, timeout=timeout) as response:
                reply.status = response.status_code
                chunks = self._before(reply.started + timeout, response.iter_bytes())
                if response.status_code == 200:
                    reply.value = read(chunks)
                else:
                    self._refused(reply, response, b"".join(chunks))
                    # Some servers hang up after an error: the next try takes a new connection.
                    response.extensions["network_stream"].close()
        except AnswerError as error:
            reply.error = str(error)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            reply.error = f"cannot connect to {self._route}: {_reason(error)}"
            reply.retryable = True
        except httpx.TimeoutException:
            reply.error = f"no complete answer within {timeout:g} s (timeout)"
        except httpx.HTTPError as error:
            reply.error = f"the connection to {self._route} broke: {_reason(error)}"
            reply.retryable = reply.status is None
        reply.latency_ms = (time.perf_counter() - reply.started) * 1e3
        if reply.error is not None and self._api_key:
            reply.error = reply.error.replace(self._api_key, "[api key]")
        return reply

    def _refused(self, reply: Reply[T], response: httpx.Response, body: bytes) -> None:
        said = error_text(body)
        if response.is_redirect:
            said = (
                f"redirected to {response.headers.get('location')}; give that address as base_url"
            )
        reply.error = f"HTTP {response.status_code}: {said or response.reason_phrase}"
        reply.retryable = response.status_code == 429 or response.status_code >= 500
        reply.retry_after_s = parse_retry_after(response.headers.get("retry-after"))

    @staticmethod
    def _before(deadline: float, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks, until the deadline: httpx's own time-out starts anew with each of them."""
        for chunk in chunks:
            if time.perf_counter() > deadline:
                raise httpx.ReadTimeout("deadline passed")
            yield chunk


def split_base_url(base_url: str) -> tuple[str, str]:
    """(server root, API root): ``http://h:1`` -> (``http://h:1``, ``http://h:1/v1``).

    A path that names a version (``/v1``, ``/api/v4``, ``/v1beta/openai``) is the API root itself;
    so is what stands in front of ``/chat/completions``, ``/completions`` or ``/models``.

    Raises:
        ValueError: not such an address.
    """
    allowed = "it must be http(s)://host[:port][/path], an IPv6 host in brackets"
    check_text("base_url", base_url)
    try:
        base_url = settle_zone(base_url)
    except ValueError as error:
        raise ValueError(f"base_url {base_url!r} cannot be reached: {error}") from None
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ValueError(f"base_url {base_url!r} is not an address ({error}); {allowed}") from None
    if url.userinfo:
        raise ValueError(f"base_url carries a user name or password; {allowed}, keys go to api_key")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ValueError(f"base_url {base_url!r} is not allowed; {allowed}")
    check_port(f"base_url {base_url!r}", url)
    given = str(url).rstrip("/")
    whole = re.sub(r"/(chat/completions|completions|models)$", "", given)
    path = httpx.URL(whole).path.rstrip("/")
    version = re.search(r"/v\d+\w*(/|$)", path)
    if version is None:
        return whole, whole if whole != given else whole + "/v1"
    return whole[: len(whole) - len(path[version.start() :])], whole


def parse_retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds of a ``Retry-After`` header, which holds seconds or a date; None if neither."""
    if value is None:
        return None
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, when - (time.time() if now is None else now))


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
