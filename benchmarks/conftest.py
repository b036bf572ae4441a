"""Shared by the kernel benchmarks: measured bandwidth, counted bytes, the table at the end.

Run `pytest benchmarks/bench_sample.py`. A benchmark calls `kernel_bench(name, fn, num_bytes=...,
torch_fn=...)`: `fn` is timed by pytest-benchmark, `torch_fn` (the torch way of doing the same) in
turns with it, and the table shows median time, bytes, GB/s, the fraction of the bandwidth that this
machine reads memory with, and how many times faster than torch it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from inferlab import _C

_ROWS: list[dict[str, Any]] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_")


def _median_s(fn: Callable[[], object], budget_s: float = 0.3, least: int = 5) -> float:
    fn()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < least or (time.perf_counter() < end and len(times) < 1000):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.fixture(scope="session")
def read_bandwidth() -> float:
    """Bytes per second of one pass over 1 GiB with all threads: beyond any cache."""
    data = torch.ones(256 * 1024 * 1024, dtype=torch.float32)
    return data.numel() * 4 / _median_s(lambda: _C.read_memory(data), 1.0)


@pytest.fixture
def rotate() -> Callable[[Callable[[], Any], int], Callable[[], Any]]:
    """rotate(make, num_bytes): a function that hands out copies of an input in turn, as many as
    it takes to pass a core's own caches, so that no call finds what the last one left there."""

    def build(make: Callable[[], Any], num_bytes: int) -> Callable[[], Any]:
        count = max(3, min(64, (1 << 27) // max(num_bytes, 1)))
        copies = [make() for _ in range(count)]
        turn = 0

        def take() -> Any:
            nonlocal turn
            turn = (turn + 1) % count
            return copies[turn]

        return take

    return build


@pytest.fixture
def kernel_bench(benchmark: Any, read_bandwidth: float) -> Callable[..., None]:
    """Times `fn`; `num_bytes` is what it must move (0: not bound by memory)."""

    def run(
        name: str,
        fn: Callable[[], object],
        *,
        num_bytes: int,
        torch_fn: Callable[[], object] | None = None,
    ) -> None:
        torch_s = _median_s(torch_fn) if torch_fn is not None else None
        benchmark.pedantic(fn, rounds=max(5, min(200, int(0.5 / max(_median_s(fn, 0.1), 1e-6)))))
        if benchmark.stats is None:  # --benchmark-disable
            return
        median_s = benchmark.stats.stats.median
        row = {
            "name": name,
            "time_us": median_s * 1e6,
            "bytes": num_bytes,
            "gb_per_s": num_bytes / median_s / 1e9,
            "fraction_of_bandwidth": num_bytes / median_s / read_bandwidth,
            "ratio_to_torch": None if torch_s is None else torch_s / median_s,
            "read_bandwidth_gb_per_s": read_bandwidth / 1e9,
        }
        benchmark.extra_info.update(row)
        _ROWS.append(row)

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _ROWS:
        return
    bandwidth = _ROWS[0]["read_bandwidth_gb_per_s"]
    terminalreporter.section(
        f"{_C.num_threads()} threads, {_C.active_isa()}, reads {bandwidth:.1f} GB/s"
    )
    width = max(len(r["name"]) for r in _ROWS)
    terminalreporter.write_line(
        f"{'op':<{width}} {'time us':>11} {'MB':>9} {'GB/s':>7} {'of b/w':>7} {'x torch':>8}"
    )
    for r in _ROWS:
        ratio = "" if r["ratio_to_torch"] is None else f"{r['ratio_to_torch']:.1f}"
        terminalreporter.write_line(
            f"{r['name']:<{width}} {r['time_us']:>11.1f} {r['bytes'] / 1e6:>9.3f} "
            f"{r['gb_per_s']:>7.2f} {r['fraction_of_bandwidth']:>7.2f} {ratio:>8}"
        )
