"""Loads for tests: plans, records made by hand, and the logged server of the benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from inferlab.load.arrivals import Arrivals
from inferlab.load.conversations import Conversation, Turn
from inferlab.load.plan import Asking, LoadPlan, TimeLimits
from inferlab.records import Exchange, InLoad, RequestRecord

SERVER = Path(__file__).parents[2] / "benchmarks" / "sse_server.py"


def plan_of(url: str, *texts: str, **settings: Any) -> LoadPlan:
    """A closed load of one user on the server at ``url``: a conversation of one turn for each text.

    Args:
        settings: of the plan, its asking, or its limits, by name.
    """
    limits = {key: settings.pop(key) for key in [*settings] if key in TimeLimits.__annotations__}
    asked = {key: settings.pop(key) for key in [*settings] if key in Asking.__annotations__}
    asking = Asking(
        **{
            "url": url, "api_url": f"{url}/v1", "endpoint": "chat", "model": None,
            "max_tokens": 8, "temperature": 0.0, "limits": TimeLimits(**limits), **asked,
        }
    )  # fmt: skip
    conversations = tuple(Conversation((Turn(text),)) for text in texts or ("hello",))
    usual = {
        "arrivals": Arrivals("closed"), "conversations": conversations, "concurrency": 1,
    }  # fmt: skip
    plan: dict[str, Any] = {**usual, **settings}
    if plan.get("count") is None and plan.get("duration_s") is None:
        plan["count"] = len(plan["conversations"])
    return LoadPlan(asking=asking, **plan)


def record_of_times(
    *times_ms: float,
    tokens: int | None = None,
    sent_at: float = 1000.0,
    scheduled_at: float | None = None,
    end_ms: float | None = None,
    failure: str | None = None,
    tries: int = 1,
    prompt_tokens: int | None = 3,
    **load: Any,
) -> RequestRecord:
    """A record whose chunks came at these times.

    Args:
        tokens: by usage; None: the server told of none.
        load: further attributes of `InLoad`.
    """
    place = {"conversation": 0, "turn": 0, **load}
    if times_ms and "first_content_ms" not in place:
        place["first_content_ms"] = times_ms[0]
    last_ms = end_ms if end_ms is not None else times_ms[-1] if times_ms else 0.0
    return RequestRecord(
        source="http",
        model="m",
        prompt="p",
        prompt_tokens=prompt_tokens,
        text="x" * len(times_ms),
        num_tokens=tokens if tokens is not None else len(times_ms),
        counted_by="usage" if tokens is not None else "chunks" if times_ms else None,
        error=None if failure is None else f"it failed: {failure}",
        started_at=sent_at,
        latency_ms=times_ms[-1] if times_ms and failure is None else last_ms,
        first_token_ms=times_ms[0] if times_ms else None,
        text_times_ms=list(times_ms),
        exchange=Exchange(
            server="http://here",
            endpoint="chat",
            stream=True,
            attempts=tries,
            status_code=200,
            elapsed_ms=last_ms,
            load=InLoad(
                scheduled_at=sent_at if scheduled_at is None else scheduled_at,
                sent_at=sent_at,
                failure=failure,
                end_ms=last_ms,
                **place,
            ),
        ),
    )


class LoggedServer:
    """`benchmarks/sse_server.py` as a process, until the end of a ``with`` block; then ``log``."""

    def __init__(self, *flags: str) -> None:
        self._flags = flags

    def __enter__(self) -> LoggedServer:
        self._folder = tempfile.TemporaryDirectory(prefix="inferlab-sse-")
        self._log = Path(self._folder.name) / "log"
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), "--log", str(self._log), *self._flags],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def stop(self) -> list[dict[str, Any]]:
        """Ends it; what it wrote when."""
        self._process.terminate()
        self._process.wait(30)
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()
