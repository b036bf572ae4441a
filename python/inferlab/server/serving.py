"""Runs an application until the process is told to end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

KEEP_ALIVE_SECONDS = 75


class Server(uvicorn.Server):
    """Ends at the first SIGTERM or SIGINT, once what runs has ended; at the second at once."""

    def __init__(self, app: FastAPI, host: str, port: int, *, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=max(round(drain_seconds), 1),
                server_header=False,
            )
        )
        self._engine = app.state.service.engine

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """In place of uvicorn's, which raises the signal anew at the end."""
        loop = asyncio.get_running_loop()
        handled = (signal.SIGTERM, signal.SIGINT)
        for number in handled:
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._engine.drain()


def serve(
    app: FastAPI,
    host: str,
    port: int,
    *,
    drain_seconds: float = 30.0,
    ready: Callable[[str, int], None] = lambda host, port: None,
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        port: 0 takes a free one.
        drain_seconds: how long requests may go on after the signal.
        ready: called with the address where connections are taken.

    Raises:
        OSError: the address cannot be had.
    """
    listening = _listen(host, port)
    try:
        server = Server(app, host, port, drain_seconds=drain_seconds)
        ready(*listening.getsockname()[:2])
        server.run(sockets=[listening])
    finally:
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on, before the loop runs: none is refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
