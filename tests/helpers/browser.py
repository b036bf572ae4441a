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
COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


class Page:
    """A page that is open for the length of a ``with`` block."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._asked = 0
        self._told: list[dict[str, Any]] = []

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
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    def be_a_phone(self, width: int, height: int) -> None:
        """Lays the page out as on a phone of so many CSS pixels."""
        size = {"width": width, "height": height}
        self._ask("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=2, mobile=True)

    def complaints(self) -> list[str]:
        """What the browser's console has of errors and warnings, from the page's beginning."""
        self._ask("Log.enable")
        self._ask("Runtime.enable")
        self.value("1")  # what came before has been told by then
        return [json.dumps(told) for told in self._told if told["method"] in COMPLAINTS]

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._asked += 1
        self._socket.send(json.dumps({"id": self._asked, "method": method, "params": params}))
        while True:
            answer: dict[str, Any] = json.loads(self._socket.recv(timeout=LIMIT_S))
            if answer.get("id") == self._asked:
                return dict(answer["result"])
            self._told.append(answer)

    def wait_for(self, expression: str) -> Any:
        """Its value, once that is true."""
        return _until(lambda: self.value(expression))


def _until(made: Any) -> Any:
    end = time.monotonic() + LIMIT_S
    while not (value := made()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)
    return value
