"""Requests of one HTTP request on their way through the engine, seen from the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from inferlab.scheduler import Request
from inferlab.server.engine_thread import EngineThread, Ticket
from inferlab.specdec.emission import Emission

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Waker:
    """Sets events of a loop from another thread: however many in one step, the loop hears once.

    While the loop is busy nothing more is queued, so what comes meanwhile is sent together: clients
    get as many chunks as there is time for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: deque[asyncio.Event] = deque()
        self._asked = False

    def wake(self, event: asyncio.Event) -> None:
        """Has the loop set an event; from any thread."""
        self._due.append(event)
        if not self._asked:
            self._asked = True
            with suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        self._asked = False  # before looking: what is put in from here on asks again
        while self._due:
            self._due.popleft().set()


class Call:
    """Requests that were handed in for one client.

    Args:
        streams: whether it is told of each step, or of the end alone.
    """

    def __init__(
        self, engine: EngineThread, waker: Waker, requests: Sequence[Request], streams: bool
    ) -> None:
        self.requests = list(requests)
        self._engine = engine
        self._event = asyncio.Event()
        self._ticket = Ticket(requests, lambda: waker.wake(self._event), streams)
        self._gone = False

    def submit(self) -> None:
        """Hands them in. Raises as `EngineThread.submit` does."""
        self._engine.submit(self._ticket)

    async def emissions(self, receive: Receive) -> AsyncGenerator[list[Emission]]:
        """What they get, as it comes; whatever ends this ends them.

        Args:
            receive: of ASGI, the body having been read: it tells when the client has left.

        Raises:
            ClientGone: it has.
        """
        watching = asyncio.create_task(self._watch(receive))
        try:
            while True:
                await self._event.wait()
                self._event.clear()
                if self._gone:
                    raise ClientGone
                done = self._ticket.open == 0  # before looking: then all of it is there
                inbox = self._ticket.inbox
                came = [inbox.popleft() for _ in range(len(inbox))]
                if came:
                    yield came
                if done:
                    return
        finally:
            watching.cancel()
            self.abort()

    def abort(self) -> None:
        """Ends what has not ended."""
        left = [request for request in self.requests if not request.finished]
        if left:
            self._engine.abort(left)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._event.set()
