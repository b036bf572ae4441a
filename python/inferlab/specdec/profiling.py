"""What an engine did when: a trace for Perfetto, with the phases of its steps on their own track.

The trace is torch's profiler's, of operations and, on a CUDA device, kernels; there the phases are
NVTX ranges, too, for Nsight Systems. Whoever profiles pays for it: times in a trace are longer than
without.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inferlab.output import write_text
from inferlab.specdec.engine import Engine

PROCESS, TRACK = "inferlab engine", "phases"
REST = "rest"
"""Between phases: planning, and what is done outside of the engine."""
_ORIGIN = "inferlab: origin of the phases"


class Span(NamedTuple):
    """A phase, in seconds of ``time.perf_counter``."""

    phase: str
    begin_s: float
    end_s: float


class PhaseTimeline:
    """Keeps the phases as they come.

    Args:
        nvtx: also as ranges of NVTX.
    """

    def __init__(self, nvtx: bool) -> None:
        self.spans: list[Span] = []
        self._nvtx = nvtx
        self._open = False

    def begin(self, phase: str | None) -> None:
        self.close()
        if self._nvtx and phase is not None:
            torch.cuda.nvtx.range_push(phase)
            self._open = True

    def end(self, phase: str, begin_s: float, end_s: float) -> None:
        self.spans.append(Span(phase, begin_s, end_s))

    def close(self) -> None:
        """Ends the range that is open."""
        if self._open:
            torch.cuda.nvtx.range_pop()
            self._open = False


@contextmanager
def profiled(engine: Engine, path: str | Path) -> Iterator[PhaseTimeline]:
    """Profiles what the engine does meanwhile, in this thread; then writes the trace.

    Args:
        path: of a JSON file in Chrome's trace format, which https://ui.perfetto.dev opens.

    Raises:
        UsageError: it cannot be written.
    """
    on_cuda = engine.target.device.type == "cuda"
    timeline = PhaseTimeline(nvtx=on_cuda)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function(_ORIGIN):
            origin_s = time.perf_counter()
        engine.clock.timeline = timeline
        try:
            yield timeline
        finally:
            engine.clock.timeline = None
            timeline.close()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text("utf-8"))
    for name in ("host_name", "traceName"):  # nobody's business
        trace.pop(name, None)
    trace["traceEvents"] += phase_events(trace["traceEvents"], tiled(timeline.spans), origin_s)
    write_text(path, json.dumps(trace), "--profile")


def tiled(spans: Sequence[Span]) -> list[Span]:
    """The spans, and what is between them as `REST`: without a gap from the first to the last."""
    found: list[Span] = []
    for span in spans:
        if found and span.begin_s > found[-1].end_s:
            found.append(Span(REST, found[-1].end_s, span.begin_s))
        found.append(span)
    return found


def phase_events(
    events: Sequence[dict[str, Any]], spans: Sequence[Span], origin_s: float
) -> list[dict[str, Any]]:
    """The spans as events of a trace, in a process of their own.

    Args:
        events: of the trace, among them that of the origin.
        origin_s: when that began.
    """
    origin_us = next(event["ts"] for event in events if event.get("name") == _ORIGIN)
    pid = 1 + max(event["pid"] for event in events if isinstance(event.get("pid"), int))
    names = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": PROCESS}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": -1}},
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": 0, "args": {"name": TRACK}},
    ]
    return names + [
        {
            "ph": "X",
            "cat": "phase",
            "name": span.phase,
            "pid": pid,
            "tid": 0,
            "ts": origin_us + (span.begin_s - origin_s) * 1e6,
            "dur": (span.end_s - span.begin_s) * 1e6,
        }
        for span in spans
    ]
