"""Connections: what a client may send before it is heard, and how long it may take to."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from inferlab.server.failures import ApiError

MAX_HEAD_BYTES = 64 * 2**10
"""Of a request, bodies and as much around their chunks aside: path, headers, trailers."""
HEAD_SECONDS = 30.0
"""How long the head of a request may take, and a new connection to begin one."""
MAX_PIPELINED = 16
"""Requests of a connection that may wait for the answer to the one before them."""
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with bounds, that tells every request of it when the client leaves.

    Offers of other protocols are passed over: the parser would take the body for the other one.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_bytes = 0
        self._in_body = False
        self._deadline: asyncio.TimerHandle | None = None
        self._unanswered: list[Any] = []  # before the newest request; uvicorn tells that one alone

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_deadline()
        super().connection_lost(exc)
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        if not self._in_body:
            head, blank, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nx-upgrade:", head) + blank + rest
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._await_head()

    def on_headers_complete(self) -> None:
        self._end_deadline()
        self._in_body = True
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError(f"more than {MAX_PIPELINED} requests are pipelined")
        before = self.cycle
        super().on_headers_complete()
        if before is not None:
            self._unanswered = [c for c in (*self._unanswered, before) if not c.response_complete]

    def on_body(self, body: bytes) -> None:
        self._head_bytes -= 2 * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False

    def send_400_response(self, msg: str) -> None:
        """In OpenAI's form, what is no HTTP, or more than is taken."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        if not self._is_answering():
            body = json.dumps(ApiError(status, message).body()).encode()
            head = (
                f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _is_answering(self) -> bool:
        cycle = self._unanswered[0] if self._unanswered else self.cycle
        return cycle is not None and cycle.response_started and not cycle.response_complete

    def _await_head(self) -> None:
        self._end_deadline()
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
