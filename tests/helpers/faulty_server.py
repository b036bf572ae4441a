"""A server on the loopback interface that answers as a test tells it to, faults included."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from helpers.serving import Serving


@dataclass
class Respond:
    """One answer. Pieces of the body that are numbers are pauses in seconds.

    ``length`` overrides the Content-Length; without one (``length=-1``) the body ends with the
    connection. ``hang_up`` closes the connection before any byte. ``raw``: the pieces are all that
    is written, heads included.
    """

    body: bytes | list[bytes | float] = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    hang_up: bool = False
    raw: bool = False

    @staticmethod
    def json(value: Any, status: int = 200, **headers: str) -> Respond:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Respond(json.dumps(value).encode(), status, named)

    @staticmethod
    def events(*events: Any) -> Respond:
        """A stream; texts stand as they are, numbers are pauses, all else is a data event."""
        body: list[bytes | float] = [
            event if isinstance(event, float)
            else event.encode() if isinstance(event, str)
            else b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
            for event in events
        ]  # fmt: skip
        return Respond(body, headers={"Content-Type": "text/event-stream"}, length=-1)


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    payload: Any


class FaultyServer(Serving):
    """Answers the n-th request by the n-th answer queued, the last one again and again.

    Args:
        tls: speaks https with the certificate of this context.
    """

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.answers: list[Respond | Callable[[Request], Respond]] = []
        self.models: Respond = Respond.json({"object": "list", "data": [{"id": "first"}]})
        self.health: Respond = Respond.json({})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                request = self._record(None)
                known = {"/health": outer.health, "/v1/models": outer.models}
                self._send(known.get(request.path, Respond(b"not found", 404)))

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                request = self._record(json.loads(self.rfile.read(length)))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                self._send(answer(request) if callable(answer) else answer)

            def _record(self, payload: Any) -> Request:
                request = Request(self.command, self.path, dict(self.headers), payload)
                outer.requests.append(request)
                return request

            def _send(self, answer: Respond) -> None:
                self.close_connection = True
                if answer.hang_up:
                    return
                pieces = answer.body if isinstance(answer.body, list) else [answer.body]
                if not answer.raw:
                    self._send_head(answer, pieces)
                try:
                    for piece in pieces:
                        if isinstance(piece, bytes):
                            self.wfile.write(piece)
                            self.wfile.flush()
                        else:
                            time.sleep(piece)
                except OSError:
                    pass  # the client went away, as in the tests of time-outs it should

            def _send_head(self, answer: Respond, pieces: list[bytes | float]) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                length = answer.length
                if length is None:
                    length = sum(len(piece) for piece in pieces if isinstance(piece, bytes))
                if length >= 0:
                    self.send_header("Content-Length", str(length))
                self.send_header("Connection", "close")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

        self._server = Server((host, 0), Handler)
        self.port = self._server.server_address[1]
        if tls is not None:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        name = f"[{host}]" if ":" in host else host
        self.url = f"{'http' if tls is None else 'https'}://{name}:{self.port}"

    @property
    def posts(self) -> list[Request]:
        return [request for request in self.requests if request.method == "POST"]


@contextmanager
def closed_port() -> Iterator[int]:
    """A port of this machine at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        yield held.getsockname()[1]


def chat(text: str | None = "Hello there", **more: Any) -> dict[str, Any]:
    """A body as vLLM sends it from /v1/chat/completions."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "first",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10},
        **more,
    }


def delta(finish_reason: str | None = None, **content: Any) -> dict[str, Any]:
    """One streamed chat chunk."""
    choice = {"index": 0, "delta": content, "finish_reason": finish_reason}
    return {"model": "first", "choices": [choice]}
