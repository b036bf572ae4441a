"""Runs an application until the process is told to end."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from inferlab.server.connection import Connection

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAX_FILES = 2**16


WRITE_SECONDS = 5
"""How long clients have, at the end, to take the last of their answers."""


class Server(uvicorn.Server):
    """Ends at the first SIGTERM or SIGINT, once what runs has ended; the second is deadly."""

    def __init__(self, app: FastAPI, host: str, port: int, *, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=Connection,
                ws="none",
                log_config=None,
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(drain_seconds) + WRITE_SECONDS,
                server_header=False,
            )
        )
        self._engine = app.state.service.engine
        self._drain_seconds = drain_seconds

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """In place of uvicorn's, which raises the signal anew at the end."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _end(self) -> None:
        log.info("told to end: what runs is completed, for %g s at most", self._drain_seconds)
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        self.should_exit = True
        self._engine.drain()
        loop.call_later(self._drain_seconds, self._engine.end)


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
    _allow_connections()
    listening = _listen(host, port)
    try:
        server = Server(app, host, port, drain_seconds=drain_seconds)
        ready(*listening.getsockname()[:2])
        server.run(sockets=[listening])
    finally:
        listening.close()


def _allow_connections() -> None:
    """As many open files as the system lets a process have: each connection is one."""
    with suppress(ImportError, ValueError, OSError):  # elsewhere there is no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on, before the loop runs: none is refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
