"""A page in a real browser without a window, asked by the protocol of its developer tools."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
LIMIT_S = 60


class Page:
    """A page that is open for the length of a ``with`` block."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> Page:
        from websockets.sync.client import connect

        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
                *("--remote-debugging-port=0", f"--user-data-dir={self._folder.name}", self._url),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = Path(self._folder.name) / "DevToolsActivePort"
        port = _until(lambda: port_file.exists() and port_file.read_text().split("\n")[0])
        targets = httpx.get(f"http://127.0.0.1:{port}/json", trust_env=False).json()
        (page,) = (target for target in targets if target["type"] == "page")
        self._socket = connect(page["webSocketDebuggerUrl"], max_size=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is worth in the page."""
        params = {"expression": expression, "returnByValue": True}
        self._socket.send(json.dumps({"id": 1, "method": "Runtime.evaluate", "params": params}))
        answer: dict[str, Any] = json.loads(self._socket.recv(timeout=LIMIT_S))
        return answer["result"]["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Its value, once that is true."""
        return _until(lambda: self.value(expression))


def _until(made: Any) -> Any:
    end = time.monotonic() + LIMIT_S
    while not (value := made()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)
    return value
