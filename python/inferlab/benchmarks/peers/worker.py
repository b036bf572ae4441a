"""The process of a peer: `PYTHON worker.py FILE WAY`. Needs the standard library alone.

A JSON object a line on stdin, ``{"call": METHOD, "with": {ARGUMENT: VALUE}}``; for each a line on
stdout: ``{"done": RESULT}``, or ``{"error": TEXT, "missing": PACKAGE or null, "trace": TEXT}``;
``peak_rss_mb`` in both. What the peer's libraries print goes to stderr. Ends with stdin.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import types
from typing import Any


def main() -> None:
    """Serves calls until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    file, way = sys.argv[1:3]
    peer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, Any]
        try:
            peer = peer or _module(file).Peer(way)
            reply = {"done": getattr(peer, request["call"])(**request["with"])}
        except Exception as error:
            missing = isinstance(error, ImportError)
            reply = {
                "error": " ".join(str(error).split()) or type(error).__name__,
                "missing": (getattr(error, "name", None) or "a package") if missing else None,
                "trace": traceback.format_exc(),
            }
        reply["peak_rss_mb"] = peak_rss_mb()
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    os._exit(0)  # whatever threads a library left running: nobody asks any more


def _module(file: str) -> Any:
    """A peer's file as a module that may import its neighbours, and by whose name (``openvino``)
    a package can still be imported."""
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != own]
    folder, name = os.path.split(os.path.abspath(file))
    package = types.ModuleType("peers")
    package.__path__ = [folder]
    sys.modules["peers"] = package
    return importlib.import_module(f"peers.{os.path.splitext(name)[0]}")


def peak_rss_mb() -> float | None:
    """The most memory that was resident, in MB (2^20 bytes); None where the system does not tell.

    On Linux it is that of this program. `getrusage` would begin with the parent's, from which the
    process was forked.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


if __name__ == "__main__":
    main()
