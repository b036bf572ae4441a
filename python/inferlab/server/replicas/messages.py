"""An HTTP request on its way to a replica, and what the replica's application answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
"""Of ASGI."""


@dataclass(frozen=True)
class HttpCall:
    """A request that has been read.

    Attributes:
        key: what its text begins with (see `beginnings`).
        avoid: names of replicas that it was lost or refused at.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    key: str | None = None
    avoid: frozenset[str] = frozenset()

    def scope(self) -> dict[str, Any]:
        """As an ASGI application is told of it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "client": None,
            "server": None,
        }


async def answers(app: Any, call: HttpCall) -> AsyncGenerator[list[Message]]:
    """What an ASGI application answers, all messages that there are at a time.

    Closing this ends the application's work on the request.
    """
    ready: asyncio.Queue[Message | None] = asyncio.Queue()
    read = False

    async def receive() -> Message:
        nonlocal read
        if read:
            await asyncio.Event().wait()  # the client is there until this is cancelled
        read = True
        return {"type": "http.request", "body": call.body, "more_body": False}

    async def run() -> None:
        try:
            await app(call.scope(), receive, ready.put)
        finally:
            ready.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        ended = False
        while not ended:
            came = [await ready.get()]
            while not ready.empty():
                came.append(ready.get_nowait())
            ended = came[-1] is None
            if messages := [message for message in came if message is not None]:
                yield messages
        await task
    finally:
        task.cancel()
