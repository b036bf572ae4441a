"""Servers of the standard library in a thread of their own, for the length of a ``with`` block."""

from __future__ import annotations

import socketserver
import threading
from typing import TypeVar

Own = TypeVar("Own", bound="Serving")


class Serving:
    """Runs ``_server``, which a subclass makes."""

    _server: socketserver.BaseServer

    def __enter__(self: Own) -> Own:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
