"""What is refused before the application hears of a request: keys, sizes, slowness."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from inferlab.server.answers import Send
from inferlab.server.calls import ClientGone, Receive
from inferlab.server.failures import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""What browsers and load balancers ask before they have a key: the page, which asks for one, and
whether anybody is there."""
BODY_SECONDS = 60.0
"""How long a body may take to come."""
HELD_BODIES = 64
"""So many of the largest bodies are held at once, or more of smaller ones."""
DISCARD_SECONDS = 2.0
"""How long what is left of a refused body is taken in, to be thrown away."""


class Gate:
    """ASGI middleware: the API key, then the body, which is counted as it comes.

    Args:
        keys: any of them opens; none: all is open.
    """

    def __init__(self, app: Any, keys: tuple[str, ...], max_body_bytes: int) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._max_body_bytes = max_body_bytes
        self._held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        try:
            self._check_head(scope)
            await asyncio.wait_for(self._read(parts, receive), BODY_SECONDS)
        except ApiError as error:
            await _refuse(error, receive, send)
        except asyncio.TimeoutError:
            slow = ApiError(408, f"the body took longer than {BODY_SECONDS:.0f} s to come")
            await _refuse(slow, receive, send)
        except ClientGone:
            pass
        else:
            await self._app(scope, _replayed(b"".join(parts), receive), send)
        finally:
            self._held -= sum(map(len, parts))

    def _check_head(self, scope: MutableMapping[str, Any]) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._keys and scope["path"] not in OPEN_PATHS:
            self._check_key(headers.get(b"authorization", b""))
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()

    def _check_key(self, authorization: bytes) -> None:
        scheme, _, key = authorization.partition(b" ")
        # All keys are compared, each in a time that does not tell where it differs.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "no valid API key was given; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )

    async def _read(self, parts: list[bytes], receive: Receive) -> None:
        """The body, part by part."""
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._held += len(parts[-1])
            if size > self._max_body_bytes:
                raise self._too_large()
            if self._held > HELD_BODIES * self._max_body_bytes:
                raise ApiError(503, "too much is being sent at once", retry_after=1)
            if not message.get("more_body"):
                return

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._max_body_bytes} bytes", code="body_too_large"
        )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives a body that has been read, then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    return replayed


async def _refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Sends an error, throws away what of the body still comes, and has the connection closed.

    A client that is in the middle of sending would see a reset connection and never the answer.
    """
    body = json.dumps(error.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_discard(receive), DISCARD_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass
