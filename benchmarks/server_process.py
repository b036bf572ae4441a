"""A server in a process of its own, for as long as it is measured."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

START_S = 180


def start_server(
    words: Sequence[str], log: Path, stack: ExitStack, environment: Mapping[str, str]
) -> int:
    """Starts ``python -m words... --port PORT`` and waits until it takes connections; the port.

    Args:
        log: where it writes.
        stack: ends it when it is closed.
        environment: on top of this process's.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", *words, "--port", str(port)],
            env={**os.environ, **environment},
            stdout=written,
            stderr=written,
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    end = time.monotonic() + START_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return port
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"{words[0]} did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)
