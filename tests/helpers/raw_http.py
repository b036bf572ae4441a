"""HTTP by hand: requests that no client would send."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

COMPLETIONS = "/v1/completions"


def request(
    body: bytes | dict[str, Any], *headers: str, path: str = COMPLETIONS, method: str = "POST"
) -> bytes:
    """A request with its length and type, and more headers."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = (
        f"{method} {path} HTTP/1.1",
        "Host: here",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *headers,
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def head(*headers: str, path: str = COMPLETIONS) -> bytes:
    """The head of a request whose body is to come."""
    lines = (f"POST {path} HTTP/1.1", "Host: here", "Content-Type: application/json", *headers)
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the one answer that comes."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.read()


def all_of(connection: socket.socket) -> bytes:
    """Whatever comes until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(2**16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)
