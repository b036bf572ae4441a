"""The real server, `inferlab serve`, as a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from inferlab.models.assets import BUNDLED

TEMPLATE = "{% for m in messages %}# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
START_LIMIT_S = 300


def chat_model(folder: Path, template: str = TEMPLATE) -> Path:
    """The bundled target with a chat template, in a directory of its own under ``folder``."""
    made = folder / "tiny-chat"
    shutil.copytree(BUNDLED["inferlab/tiny"], made)
    (made / "chat_template.jinja").write_text(template)
    return made


class Served:
    """A server process that runs until the end of a ``with`` block.

    Attributes:
        url: where it is, without ``/v1``.
        log: what it has written.

    Args:
        flags: of `inferlab serve`.
        before: called in the process before it becomes the server.
        within: a command that runs the server's.
        start_limit_s: how long it may take to start.
    """

    def __init__(
        self,
        *flags: str,
        before: Callable[[], None] | None = None,
        within: Sequence[str] = (),
        start_limit_s: float = START_LIMIT_S,
    ) -> None:
        self._flags = flags
        self._before = before
        self._within = within
        self._start_limit_s = start_limit_s

    def __enter__(self) -> Served:
        self._folder = tempfile.TemporaryDirectory(prefix="inferlab-served-")
        self.log = Path(self._folder.name) / "log"
        words = [*self._within, sys.executable, "-m", "inferlab", "serve", "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*words, *self._flags],
                stderr=log,
                stdout=log,
                env=environment,
                preexec_fn=self._before,
            )
        self.url = self._address()
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._folder.cleanup()

    def complete(self, **body: Any) -> httpx.Response:
        """A text completion, greedy and short unless asked otherwise."""
        given = {"prompt": "class Stack:", "max_tokens": 16, "temperature": 0, **body}
        return self.http.post("/v1/completions", json=given)

    def connect(self) -> socket.socket:
        """A connection, for what no client would send."""
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return socket.create_connection((host, int(port)), timeout=60)

    def wait_until_running(self, count: int = 1, limit_s: float = 60) -> None:
        """Until so many requests are in the batch."""
        end = time.monotonic() + limit_s
        while self.metric("vllm:num_requests_running") < count:
            assert time.monotonic() < end, "no request came to run"
            time.sleep(0.002)

    def terminate(self, limit_s: float = 60) -> int:
        """Tells it to end; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit_s)

    def metric(self, name: str) -> float:
        """The sum of a figure over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        values = [line.rsplit(" ", 1)[1] for line in lines if re.match(rf"{name}[ {{]", line)]
        return sum(map(float, values))

    def wait_until_idle(self, limit_s: float = 30) -> None:
        """Until nothing runs, nothing waits and no page is in use."""
        end = time.monotonic() + limit_s
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        while any(self.metric(name) for name in (*names, "vllm:kv_cache_usage_perc")):
            assert time.monotonic() < end, self.http.get("/metrics").text
            time.sleep(0.05)

    def _address(self) -> str:
        end = time.monotonic() + self._start_limit_s
        while time.monotonic() < end:
            if found := re.search(r"serving \S+ on (http://\S+)", self.log.read_text()):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()}")
