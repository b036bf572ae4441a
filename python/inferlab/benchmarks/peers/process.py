"""Talking to a peer's process: started, asked and, when it does not answer, ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferlab.benchmarks.peers import PeerFacts

WORKER = Path(__file__).with_name("worker.py")


class PeerMissing(RuntimeError):
    """A package of the peer is not there. ``package``: its name."""

    def __init__(self, package: str) -> None:
        super().__init__(f"{package} is not installed")
        self.package = package


class PeerFailed(RuntimeError):
    """The peer raised an error, and can be asked again. ``trace``: where."""

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace


class PeerGone(RuntimeError):
    """The peer's process ended, did not answer in time or answered nonsense; it is no more."""


class PeerProcess:
    """A peer in a process of its own, with thread pools and memory of its own.

    Attributes:
        peak_rss_mb: the most memory that it had so far, in MB (2^20 bytes); None: not known.

    Args:
        facts: which peer.
        python: the interpreter that has it.
        log: file for what its libraries print.
        threads: of its thread pools.
        extra: environment variables beside this process's.
    """

    def __init__(
        self,
        facts: PeerFacts,
        python: str,
        log: Path,
        threads: int,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.peak_rss_mb: float | None = None
        self._log = log
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)  # packages for another interpreter
        environment.update(extra or {})
        with log.open("ab") as printed:
            self._process = subprocess.Popen(
                [python, str(WORKER), str(WORKER.parent / f"{facts.file}.py"), facts.way],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env=environment,
                start_new_session=True,  # Ctrl-C is the parent's to hear
            )
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def call(self, method: str, timeout_s: float, **arguments: Any) -> Any:
        """The result of a method of the peer.

        Raises:
            PeerMissing, PeerFailed, PeerGone
        """
        assert self._process.stdin is not None
        request = json.dumps({"call": method, "with": arguments}).encode()
        try:
            self._process.stdin.write(request + b"\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise PeerGone(
                f"no answer to {method} in {timeout_s:g} s; it was ended (--peer-timeout)"
            ) from None
        except (OSError, ValueError):  # it ended, or was ended, before
            line = None
        if line is None:
            self._process.wait()
            raise PeerGone(self._last_words())
        try:
            reply = json.loads(line)
            self.peak_rss_mb = reply["peak_rss_mb"]
            if "done" in reply:
                return reply["done"]
            error, missing, trace = reply["error"], reply["missing"], reply["trace"]
        except (ValueError, KeyError, TypeError):
            self.close()
            raise PeerGone(f"it answered {line[:80]!r}, which is no answer; it was ended") from None
        raise PeerMissing(missing) if missing is not None else PeerFailed(error, trace)

    def close(self) -> None:
        """Ends the process and those that it started; may be called again."""
        if sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a request that it never read
            self._process.stdin.close()

    def _read(self) -> None:
        """In a thread: the time-out of a pipe is a queue's everywhere."""
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._lines.put(line)
        self._lines.put(None)

    def _last_words(self) -> str:
        """How the process ended, and the last that it printed."""
        code = self._process.returncode
        how = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        printed = self._log.read_text(encoding="utf-8", errors="replace").strip()
        last = printed.splitlines()[-1][-300:] if printed else ""
        return f"its process ended {how}" + (f": {last}" if last else "")
