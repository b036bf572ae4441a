"""Processes that are the ranks of one group, as torchrun would start them; each runs a function of
a test's own and writes what it returns."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from inferlab.models.parallel import ranks

TESTS = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600


def start(function: str, size: int, folder: Path, *arguments: Any) -> list[subprocess.Popen[bytes]]:
    """Starts ``size`` ranks, each of which calls ``module:function`` with the arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "helpers.ranks", function, str(folder), json.dumps(arguments)]
    processes = []
    for rank in range(size):
        with (folder / f"log{rank}").open("wb") as log:
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
            )
    return processes


def finish(processes: list[subprocess.Popen[bytes]], timeout_s: float = TIMEOUT_S) -> list[int]:
    """Exit codes of all; kills those that take longer, which fails."""
    try:
        return [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def run(function: str, size: int, folder: Path, *arguments: Any) -> Any:
    """What the function returned on rank 0, as JSON."""
    codes = finish(start(function, size, folder, *arguments))
    logs = "\n".join((folder / f"log{rank}").read_text() for rank in range(size))
    assert codes == [0] * size, f"exit codes {codes}\n{logs}"
    return result(folder)


def result(folder: Path) -> Any:
    """What the function returned on rank 0, as JSON."""
    return json.loads((folder / "result.json").read_text())


def together(part: ranks.Part) -> ranks.Ranks:
    """The ranks that this process belongs to, in the leader's hands; others do not come back."""
    return ranks.leader(int(os.environ["WORLD_SIZE"]), part)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells' background jobs ignore it
    name, folder, arguments = sys.argv[1:]
    module, function = name.split(":")
    returned = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    Path(folder, "result.json").write_text(json.dumps(returned))
