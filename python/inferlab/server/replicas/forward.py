"""The ingress: an ASGI application that has replicas answer, and asks another where one is lost."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from inferlab.server.answers import Send, write_event
from inferlab.server.calls import Receive
from inferlab.server.failures import ApiError
from inferlab.server.replicas.beginnings import beginning
from inferlab.server.replicas.figures import merged
from inferlab.server.replicas.messages import HttpCall, Message

log = logging.getLogger(__name__)

RETRIES = 2
ACCEPT_SECONDS = 60.0
PROBE_SECONDS = 5.0
"""How long a request waits for a replica that takes it; how long a probe does."""

PROBES = frozenset({"/health", "/ready"})
REFUSED = frozenset({429, 503})
"""What one replica says when another may well take the request."""


class ReplicaLost(Exception):
    """A replica is gone, and with it what it was working on."""


class NoneFree(Exception):
    """As many requests wait for a replica as may wait."""


class Replicas(Protocol):
    """Those who answer."""

    def ask(self, call: HttpCall) -> AsyncGenerator[Any]:
        """The name of the replica that has taken the request, then its messages, lists of them.

        Raises:
            ReplicaLost: it is gone.
            NoneFree: nobody took it.
        """

    async def figures(self) -> dict[str, str]:
        """Metrics of each, by name."""


class Forward:
    """Answers by the replicas' answers. An answer that is lost before anything of it was sent is
    asked for anew, elsewhere: a request changes nothing, and a seed gives the same tokens anywhere.
    """

    def __init__(
        self, replicas: Replicas, *, retries: int = RETRIES, accept_seconds: float = ACCEPT_SECONDS
    ) -> None:
        self._replicas = replicas
        self._retries = retries
        self._accept_seconds = accept_seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
        else:
            try:
                await self._http(scope, receive, send)
            except ApiError as error:
                await _send_error(error, send)

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path == "/metrics" and scope["method"] == "GET":
            text = merged(await self._replicas.figures()).encode()
            kind = b"text/plain; version=0.0.4; charset=utf-8"
            await _send_whole(200, [(b"content-type", kind)], text, send)
            return
        body = await _read(receive)
        call = HttpCall(
            scope["method"],
            path,
            scope.get("query_string", b""),
            tuple((bytes(name), bytes(value)) for name, value in scope["headers"]),
            body,
            beginning(body),
        )
        for left in reversed(range(self._retries + 1)):
            reply = Reply(send)
            asked: list[str] = []
            try:
                await self._try(call, reply, asked)
            except ReplicaLost as error:
                log.warning("%s was lost at %s: %s", path, *asked or ["no replica"], error)
                if reply.begun:
                    await reply.break_off(_lost(), path)
                    return
                if not left:
                    raise _lost() from error
            else:
                if reply.begun or not left or reply.status not in REFUSED or path in PROBES:
                    await reply.flush()
                    return
            call = replace(call, avoid=call.avoid | set(asked))

    async def _try(self, call: HttpCall, reply: Reply, asked: list[str]) -> None:
        """Asks one replica, whose name is put into ``asked``."""
        limit = PROBE_SECONDS if call.path in PROBES else self._accept_seconds
        async with aclosing(self._replicas.ask(call)) as answer:
            try:
                asked.append(await asyncio.wait_for(anext(answer), limit))
            except asyncio.TimeoutError:
                raise ApiError(503, "no replica takes requests now", retry_after=5) from None
            except NoneFree as error:
                raise ApiError(429, str(error), code="queue_full", retry_after=1) from error
            async for messages in answer:
                for message in messages:
                    await reply.take(message)
        if not reply.ended:
            raise ReplicaLost("the answer has no end")


class Reply:
    """An answer on its way to the client. A stream is passed on as it comes, from its first event
    on; any other answer is held back until all of it is there.

    Attributes:
        status: of HTTP; 0: not known yet.
        begun: something of it has been sent.
        ended: all of it is there.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[Message] = []
        self._streams = False
        self.status = 0
        self.begun = False
        self.ended = False

    async def take(self, message: Message) -> None:
        """Takes a message of the replica's application."""
        self._held.append(message)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kinds = [value for name, value in message["headers"] if name == b"content-type"]
            self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
            if self._streams and message.get("body"):
                await self.flush()

    async def flush(self) -> None:
        """Sends what is held."""
        held, self._held = self._held, []
        for message in held:
            self.begun = True
            await self._send(message)

    async def break_off(self, error: ApiError, path: str) -> None:
        """Ends a stream that will have no end of its own, with an event that says why."""
        if path.endswith("/responses"):
            content = {"type": "error", "code": "server_error", "message": str(error)}
            event = write_event({**content, "param": None}, "error")
        else:
            event = write_event(error.body())
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _lost() -> ApiError:
    return ApiError(503, "the replica that worked on this was lost; ask again", retry_after=1)


async def _read(receive: Receive) -> bytes:
    """The body of a request. Raises ApiError where its sender has left."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client has left")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _send_error(error: ApiError, send: Send) -> None:
    headers = {"content-type": "application/json", **error.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await _send_whole(error.status, pairs, json.dumps(error.body()).encode(), send)


async def _send_whole(
    status: int, headers: list[tuple[bytes, bytes]], body: bytes, send: Send
) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _lifespan(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
