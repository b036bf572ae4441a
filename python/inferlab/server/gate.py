"""What is refused before anything of a request is read: keys and sizes."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from inferlab.server.answers import Send
from inferlab.server.calls import Receive
from inferlab.server.failures import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""What browsers and load balancers ask before they have a key: the page, which asks for one, and
whether anybody is there."""

DISCARD_SECONDS = 2.0
"""How long what is left of a refused body is taken in, to be thrown away."""


class Gate:
    """ASGI middleware: the API key, then the size of the body, counted as it comes.

    Args:
        keys: any of them opens; none: all is open.
    """

    def __init__(self, app: Any, keys: tuple[str, ...], max_body_bytes: int) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            if self._keys and scope["path"] not in OPEN_PATHS:
                self._check_key(headers.get(b"authorization", b""))
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > self._max_body_bytes:
                raise self._too_large()
        except ApiError as error:
            await _refuse(error, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

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

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_body_bytes:
                    raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._max_body_bytes} bytes", code="body_too_large"
        )


async def _refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Sends an error, throws away what of the body still comes, and has the connection closed.

    A client that is in the middle of sending would see a reset connection and never the answer.
    """
    headers = {"content-type": "application/json", "connection": "close", **error.headers}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }
    )
    body = json.dumps(error.body()).encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_discard(receive), DISCARD_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass
