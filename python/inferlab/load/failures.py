"""What can go wrong with a request, in classes that are counted."""

from __future__ import annotations

import asyncio
import ssl

import aiohttp

FAILURES = {
    "refused": "the connection was refused",
    "dns": "the host has no address",
    "tls": "TLS failed: a certificate that cannot be trusted, or no common protocol",
    "connect_timeout": "no connection within --connect-timeout",
    "proxy": "the proxy refused, or cannot be reached",
    "unreachable": "another error of the network before there was a connection",
    "disconnected": "the connection ended before any byte of an answer",
    "first_token_timeout": "no token within --first-token-timeout",
    "stall": "no byte within --stall-timeout behind the last one",
    "timeout": "not at its end within --timeout",
    "http_status": "an HTTP status that is not 200",
    "error_event": "the server reports an error in its answer",
    "truncated": "the answer ended before its end",
    "malformed_json": "an event, or the answer, is no JSON object, or one of an unknown shape",
    "bad_utf8": "bytes that are no UTF-8",
    "protocol": "no HTTP that can be read",
    "wrong_model": "another model answered than was asked",
    "empty": "neither text nor an end",
    "interrupted": "Ctrl-C came before its end; counted apart, as nobody's failure",
}
"""Class of a failed request -> what it means."""

WARNINGS = {
    "missing_usage": "no usage: how many tokens came is not known",
    "usage_differs": "usage counts other tokens than the chunks tell; TPOT goes by usage, ITL by "
    "the chunks",
    "retried": "an earlier try failed",
    "no_done": "the stream ended with a finish reason and without [DONE]",
    "no_finish_reason": "the stream ended with [DONE] and without a finish reason: it may have "
    "been given up",
    "not_streamed": "one JSON body came instead of a stream",
}
"""What is counted of answers that stand."""

RETRYABLE = ("refused", "connect_timeout", "unreachable", "disconnected")
"""Classes that a second try may help; so do the statuses 429 and 5xx."""


class RequestFailure(Exception):
    """A request failed: ``kind`` is of FAILURES, the text says what came."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def classify(error: BaseException, *, answering: bool) -> RequestFailure:
    """What an exception of aiohttp means.

    Args:
        answering: whether the head of an answer had come already.
    """
    if isinstance(error, RequestFailure):
        return error
    text = str(error) or type(error).__name__
    reset = isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError)
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return RequestFailure("connect_timeout", text)
    if isinstance(error, aiohttp.ClientHttpProxyError | aiohttp.ClientProxyConnectionError):
        return RequestFailure("proxy", text)
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return RequestFailure("tls", text)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return RequestFailure("dns", text)
    if isinstance(error, aiohttp.ClientConnectorError):
        refused = isinstance(error.os_error, ConnectionRefusedError)
        return RequestFailure("refused" if refused else "unreachable", text)
    if isinstance(error, aiohttp.ClientPayloadError) or (answering and reset):
        return RequestFailure("truncated", f"the answer ended early: {text}")
    if isinstance(error, aiohttp.ClientOSError) or reset:
        kind = "truncated" if answering else "disconnected"
        return RequestFailure(kind, f"the connection broke: {text}")
    if isinstance(error, aiohttp.ClientResponseError):
        return RequestFailure("protocol", text)
    if isinstance(error, asyncio.TimeoutError):
        return RequestFailure("timeout", text)
    return RequestFailure("protocol", f"{type(error).__name__}: {text}")
