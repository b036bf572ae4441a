"""A peer for `inferlab.benchmarks.peers.worker`, of the standard library alone.

``way``: "counts" decodes each prompt to the numbers 1, 2, 3, ...; "missing" lacks its package;
"cannot load" does not load; "crashes" ends its process when it is to decode; "hangs" never answers;
"refuses" raises an error at prompts that hold 13.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


class Peer:
    def __init__(self, way: str) -> None:
        self.way = way

    def versions(self) -> dict[str, str]:
        print("libraries print to stdout")
        os.system("echo so do their programs")
        if self.way == "missing":
            import no_such_package  # noqa: F401
        return {"fake": "1"}

    def modules(self) -> list[str]:
        return sorted(sys.modules)

    def search_path(self) -> list[str]:
        return sys.path

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def convert(self, model: str, folder: str, dtype: str) -> str:
        file = Path(folder) / "weights"
        file.write_text(f"{Path(model, 'config.json').is_file()} {dtype} {os.getpid()}")
        return str(file)

    def load(self, **given: Any) -> dict[str, Any]:
        if self.way == "cannot load":
            raise ValueError("too large\nfor this machine")
        self.given = given
        return {"format": "fake", "weights_mb": None}

    def was_given(self) -> dict[str, Any]:
        return self.given

    def allocate(self, mb: int) -> None:
        bytearray(mb << 20)[:: 1 << 12] = b"x" * (mb << 8)

    def start_thread(self) -> None:
        threading.Thread(target=time.sleep, args=(600,)).start()

    def start_another(self) -> int:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: dict[str, Any]
    ) -> dict[str, Any]:
        if self.way == "crashes":
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(7)
        if self.way == "hangs":
            time.sleep(600)
        if self.way == "refuses" and any(13 in ids for ids in prompts):
            raise RuntimeError("13 brings bad luck")
        ids = [list(range(1, max_new_tokens + 1)) for _ in prompts]
        return {"ids": ids, "ms": 2.0, "first_ms": None}
