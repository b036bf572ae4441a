"""How a kernel is timed, on the CPU and on CUDA.

A round: flush the cache, then call the op once on each of several input sets, so that none of them
lies in the cache; the round's time over its calls is one sample. Rivals (torch, peers, a plain read
or copy of as many bytes) have their rounds in turns with the op's own, so that a machine that slows
down slows all of them. On CUDA the calls of a round are captured in one CUDA graph and CUDA events
stand around its replay; what cannot be captured is called eagerly between the events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from inferlab import _C

MIB = 1 << 20
MAX_CALLS = 16  # input sets of one round
ROUND_S = 0.01  # a round of more than one call is no longer than this
WARM_ROUND_S = 200e-6  # length of a round whose inputs may lie in the cache


class HostClock:
    """A timer of seconds per call: the wall clock over the number of calls in a round."""

    calls = 1

    def begin(self, calls: int) -> None:
        """A round of so many calls comes next."""
        self.calls = calls

    def __call__(self) -> float:
        return time.perf_counter() / self.calls


class CudaClock(HostClock):
    """The same from CUDA events; calls come in pairs, and the second waits for the device."""

    def __init__(self, new_event: Callable[[], Any] | None = None) -> None:
        self._new_event = new_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._start: Any = None

    def begin(self, calls: int) -> None:
        super().begin(calls)
        self._start = None  # a round that raised has left its start behind

    def __call__(self) -> float:
        event = self._new_event()
        event.record()
        if self._start is None:
            self._start = event
            return 0.0
        event.synchronize()
        start, self._start = self._start, None
        return start.elapsed_time(event) / 1e3 / self.calls


CLOCKS: dict[str, HostClock] = {"cpu": HostClock(), "cuda": CudaClock()}


class Device:
    """Where a benchmark runs: its clock, its cache flush, its inputs, its measured bandwidth."""

    def __init__(self, name: str, yardstick_bytes: int, flush_bytes: int, case_bytes: int) -> None:
        """
        Args:
            yardstick_bytes: what bandwidth is measured over.
            flush_bytes: what is read to leave nothing else in the last cache.
            case_bytes: memory that the input sets of one benchmark may take.
        """
        self.name = name
        self.torch = torch.device(name)
        self.clock = CLOCKS[name]
        self.flush_bytes, self.case_bytes = flush_bytes, case_bytes
        # Inputs have a generator of their own: CUDA graphs take hold of the default one.
        self.generator = torch.Generator(device=name)
        self._yardstick_bytes = max(yardstick_bytes, flush_bytes)

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What yardsticks read; what they write, and what a flush reads."""
        data, trash = (torch.ones(self._yardstick_bytes // 4, device=self.torch) for _ in range(2))
        return data, trash

    def flush(self) -> None:
        """Reads more than the last cache holds. (Written lines would be written back at the cost
        of whoever comes next.)"""
        self._read(self._buffers[1][: self.flush_bytes // 4])

    def _read(self, data: torch.Tensor) -> None:
        raise NotImplementedError

    def prepare(self, fn: Callable[[Any], object], cases: Sequence[Any]) -> tuple[Any, str]:
        """A function that calls `fn` on every case, and how it will be timed."""
        raise NotImplementedError

    def plain(self, kind: str, num_bytes: int) -> tuple[Callable[[Any], object], list[Any]]:
        """A plain read or copy that moves about `num_bytes`, as a function and its cases."""
        unit = 256 if kind == "read" else 512  # bytes moved by 64 floats
        data, trash = self._buffers
        floats = min(max(num_bytes // unit, 1) * 64, data.numel())
        count = min(MAX_CALLS, data.numel() // floats)
        pairs = list(zip(data.split(floats), trash.split(floats), strict=True))[:count]
        if kind == "read":
            return (lambda pair: self._read(pair[0])), pairs
        return (lambda pair: pair[1].copy_(pair[0])), pairs

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        self.clock.begin(calls)
        start = self.clock()
        run()
        return self.clock() - start

    @cached_property
    def bandwidth(self) -> dict[str, float]:
        """Bytes per second of a large copy (read + written) and, on the CPU, of a large read."""
        data, trash = self._buffers
        yardsticks: dict[str, tuple[int, Callable[[], object]]] = {
            "copy": (2 * self._yardstick_bytes, lambda: trash.copy_(data))
        }
        if self.name == "cpu":
            yardsticks["read"] = (self._yardstick_bytes, lambda: self._read(data))
        return {
            kind: num_bytes / statistics.median([self.seconds(run) for _ in range(12)][2:])
            for kind, (num_bytes, run) in yardsticks.items()
        }

    def cases(self, make: Callable[[], Any], num_bytes: int) -> list[Any]:
        """As many input sets as a round takes, of `num_bytes` each, within the memory meant for
        them."""
        return [make() for _ in range(max(1, min(MAX_CALLS, self.case_bytes // num_bytes)))]

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.torch, dtype=dtype)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, device=self.torch)

    def randint(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.torch)


def each(fn: Callable[[Any], object], cases: Sequence[Any]) -> Callable[[], None]:
    def run() -> None:
        for case in cases:
            fn(case)

    return run


class Host(Device):
    def __init__(self) -> None:
        cache = last_cache_bytes()
        super().__init__(
            "cpu",
            yardstick_bytes=max(256 * MIB, 2 * cache),
            flush_bytes=max(64 * MIB, cache + cache // 4),
            case_bytes=256 * MIB,
        )

    def _read(self, data: torch.Tensor) -> None:
        _C.read_memory(data)

    def prepare(self, fn: Callable[[Any], object], cases: Sequence[Any]) -> tuple[Any, str]:
        return each(fn, cases), "clock"


class Cuda(Device):
    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        super().__init__(
            "cuda",
            yardstick_bytes=1024 * MIB,
            flush_bytes=max(64 * MIB, 4 * cache),
            case_bytes=4096 * MIB,
        )
        self._sum = torch.empty((), device=self.torch)

    def _read(self, data: torch.Tensor) -> None:
        torch.sum(data, dim=0, out=self._sum)

    def prepare(self, fn: Callable[[Any], object], cases: Sequence[Any]) -> tuple[Any, str]:
        run = each(fn, cases)
        graph = capture(run)
        return (run, "events") if graph is None else (graph.replay, "graph")


def capture(run: Callable[[], object]) -> Any:
    """A CUDA graph of what `run` launches, or None where it does something no graph can hold."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # the first call may allocate, compile and load
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


class Contestant:
    """One way of doing a job: rounds of it, and the samples (seconds per call) they gave."""

    def __init__(
        self, device: Device, fn: Callable[[Any], object], cases: Sequence[Any], cold: bool
    ) -> None:
        fn(cases[0])
        self.once_s = max(device.seconds(lambda: fn(cases[0])), 1e-7)
        if cold:
            chosen = cases[: max(1, int(ROUND_S / self.once_s))]
        else:
            count = max(1, min(200, int(WARM_ROUND_S / self.once_s)))
            chosen = [cases[i % len(cases)] for i in range(count)]
        self.device, self.cold, self.calls = device, cold, len(chosen)
        self.run, self.how = device.prepare(fn, chosen)
        self.samples: list[float] = []

    def ready(self) -> None:
        """Brings cache and clock into the state in which a round begins: the cache is flushed, or
        has seen an untimed round. On CUDA the round is queued behind that, so that the device need
        not wait for the host when the timing starts."""
        if self.cold:
            self.device.flush()
        else:
            self.run()
        self.device.clock.begin(self.calls)

    def round(self) -> None:
        self.ready()
        self.samples.append(self.device.seconds(self.run, self.calls))

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples)


def rounds_within(contestants: Sequence[Contestant], flush_s: float, budget_s: float) -> int:
    """How many rounds of all of them fit into the budget: 7 at least, 100 at most; one where there
    is no budget at all."""
    if budget_s == 0:
        return 1
    turn_s = sum(c.calls * c.once_s + (flush_s if c.cold else 0.0) for c in contestants)
    return max(7, min(100, int(budget_s / turn_s)))


def last_cache_bytes() -> int:
    """Size of the largest cache of the first core; 32 MiB where the system does not tell."""
    sizes = [32 * MIB]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
        sizes.append(int(text[:-1]) * scale if scale else int(text or 0))
    return max(sizes)
