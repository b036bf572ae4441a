"""aiohttp's connections with a clock in them: every read of the socket is stamped.

aiohttp hands a body on to coroutines, which run when their turn comes: a stamp taken there is late
by all that was ready before. Here it is taken where the event loop hands over what it read.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

Sink = Callable[[bytes, int], None]
"""Takes some bytes of a body, and ``time.perf_counter_ns()`` at the read that brought them."""


class StampedBody:
    """The body of one answer, which goes to a sink from within the reads of the socket.

    What comes before `attach` waits with its stamps.
    """

    def __init__(self, reader: aiohttp.StreamReader) -> None:
        self._reader = reader
        self._sink: Sink | None = None
        self._ended: Callable[[], None]
        self._early: list[tuple[int, int]] = []
        self._taken = 0
        self._lost = False
        self.reading = False

    @property
    def problem(self) -> BaseException | None:
        """Why the body is not whole; None where it is."""
        return self._reader.exception()

    def attach(self, sink: Sink, ended: Callable[[], None]) -> None:
        """From here on it goes to ``sink``; ``ended`` is called when nothing more will come."""
        self._sink, self._ended = sink, ended
        for stamp_ns, total in self._early:
            if total > self._taken:
                self._pass_on(stamp_ns, total - self._taken)
        self._early.clear()
        self._end_if_over()

    def came(self, stamp_ns: int) -> None:
        """The socket was read; what it gave of the body is in the reader."""
        if self._sink is None:
            self._early.append((stamp_ns, self._reader.total_bytes))
            return
        while self._reader.total_bytes > self._taken and self._pass_on(stamp_ns, -1):
            pass
        self._end_if_over()

    def lost(self) -> None:
        """The connection has ended."""
        self._lost = True
        if self._sink is not None:
            self._end_if_over()

    def _pass_on(self, stamp_ns: int, size: int) -> bool:
        """Gives what is there to the sink; whether there was anything."""
        if self._reader.exception() is not None:
            return False
        self.reading = True
        try:
            chunk = self._reader.read_nowait(size)
        finally:
            self.reading = False
        if not chunk or self._sink is None:
            return False
        self._taken += len(chunk)
        self._sink(chunk, stamp_ns)
        return True

    def _end_if_over(self) -> None:
        if self._reader.is_eof() or self._lost or self._reader.exception() is not None:
            self._sink = None
            self._ended()


class StampedHandler(ResponseHandler):
    """A connection.

    Attributes:
        body: of the answer whose head came last.
    """

    body: StampedBody | None = None

    def feed_data(self, data: Any, size: int = 0) -> None:
        """aiohttp's: the head of an answer is here, and the reader of its body."""
        self.body = StampedBody(data[1])
        super().feed_data(data, size)

    def data_received(self, data: bytes) -> None:
        """asyncio's. To read a body may make aiohttp call it again, with bytes held back."""
        stamp_ns = time.perf_counter_ns()
        super().data_received(data)
        body = self.body
        if body is not None and not body.reading:
            body.came(stamp_ns)

    def connection_lost(self, exc: BaseException | None) -> None:
        """asyncio's: a body without a length ends here, of another the rest is missing."""
        super().connection_lost(exc)
        if self.body is not None:
            self.body.lost()


class StampedResponse(aiohttp.ClientResponse):
    """An answer whose body is stamped."""

    stamped: StampedBody

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """aiohttp's: reads the head. The connection may belong to another request right after."""
        protocol = connection.protocol
        started = await super().start(connection)
        self.stamped = protocol.body
        return started


class StampedConnector(aiohttp.TCPConnector):
    """Opens such connections."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._factory: Any = functools.partial(StampedHandler, loop=self._loop)
