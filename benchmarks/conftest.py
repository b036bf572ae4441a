"""Shared by the kernel benchmarks: devices, the `kernel_bench` fixture, the table at the end.

    pytest benchmarks/bench_*.py                    every op, on the CPU and on CUDA where it is
    pytest benchmarks/bench_sample.py -k cpu        one op, one device
    pytest benchmarks/bench_sample.py -m sweep      the big sweep instead of the chosen shapes
    ... --benchmark-json=FILE                       saved at the end, for benchmarks/report.py
    ... --rows=FILE.jsonl                           saved row by row: a run that is killed keeps
                                                    what it has measured; for report.py too
    ... --row-seconds=0.3                           timed rounds of a row; 0: one round of each
    ... --isa=avx2,avx512                           each row on the CPU with each of these

How it is timed: measure.py. Bytes: floors.py. Columns: table.py.
"""

from __future__ import annotations

import datetime
import json
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import measure
import peers as peer_ops
import table
from inferlab import _C
from inferlab.benchmarks.environment import describe_environment
from table import Shape, label

HAS_CUDA = torch.cuda.is_available() and _C.build_info()["cuda"] is not None
_DEVICES: dict[str, measure.Device] = {}
_ROWS: list[table.Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, metavar="FILE.jsonl", help="append each row as it comes")
    parser.addoption(
        "--row-seconds", type=float, default=0.8, metavar="S", help="timed rounds of a row; 0: one"
    )
    known = ", ".join(_C.build_info()["isas"])
    parser.addoption(
        "--isa", metavar="NAME,..", help=f"a row on the CPU for each instruction set ({known})"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_")
    config.addinivalue_line("markers", "sweep: one of the many shapes; run with -m sweep")
    config.option.benchmark_quiet = True  # its table has no bytes; ours is printed instead
    try:
        for name in (config.getoption("--isa") or "auto").split(","):
            _C.force_isa(name)
    except ValueError as error:
        raise pytest.UsageError(f"--isa: {error}") from None
    _C.force_isa("auto")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.config.getoption("--isa")
    if names is not None and "kernel_bench" in metafunc.fixturenames:
        metafunc.parametrize("_isa", names.split(","), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        name = callspec and callspec.params.get("_device")
        if name:
            item.add_marker(pytest.mark.benchmark(timer=measure.CLOCKS[name]))
    if not config.option.markexpr:
        sweep = [item for item in items if item.get_closest_marker("sweep")]
        config.hook.pytest_deselected(items=sweep)
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not HAS_CUDA, reason="torch finds no CUDA device, or inferlab is built without CUDA"
            ),
        ),
    ],
)
def _device(request: pytest.FixtureRequest) -> measure.Device:
    name = request.param
    _DEVICES[name] = measure.Host() if name == "cpu" else measure.Cuda()
    return _DEVICES[name]


@pytest.fixture
def _isa(request: pytest.FixtureRequest, _device: measure.Device) -> Iterator[str]:
    """The instruction set of this row; "": the best that there is."""
    name = getattr(request, "param", "")
    if name and _device.name != "cpu":
        pytest.skip("instruction sets are of CPUs")
    _C.force_isa(name or "auto")
    yield name
    _C.force_isa("auto")


@pytest.fixture
def device(_device: measure.Device) -> measure.Device:
    """The device of this row, with its random numbers at their beginning."""
    _device.generator.manual_seed(0)
    torch.manual_seed(0)
    return _device


class RowFile:
    """Rows of kernel benchmarks, on disk as soon as they are measured: a line that says what the
    run is, then a line per row."""

    def __init__(self, path: Path, config: pytest.Config) -> None:
        self._path = path
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._append({"datetime": now, "machine_info": {"inferlab": describe_run(config)}})

    def add(self, row: table.Row) -> None:
        self._append({"name": case_of(row), "extra_info": row})

    def _append(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


@pytest.fixture(scope="session")
def row_file(request: pytest.FixtureRequest) -> RowFile | None:
    path = request.config.getoption("--rows")
    return None if path is None else RowFile(path, request.config)


@pytest.fixture
def kernel_bench(
    request: pytest.FixtureRequest,
    benchmark: Any,
    device: measure.Device,
    row_file: RowFile | None,
    _isa: str,
) -> Callable[..., None]:
    """Times one op at one shape, and its rivals in turns with it."""

    def run(
        op: str,
        variant: str,
        shape: Shape,
        fn: Callable[[Any], object],
        cases: Sequence[Any],
        *,
        num_bytes: int,
        bound: str | None,
        torch_fn: Callable[[Any], object] | None = None,
        peers: Callable[[], peer_ops.Peers] = dict,
        note: str = "",
    ) -> None:
        """
        Args:
            fn, torch_fn: the op and the torch way, called with one of `cases`.
            cases: input sets, each used once in a round.
            num_bytes: what one call must move (floors.py).
            bound: "read" or "copy": memory bounds it, inputs are cold, and a plain read or copy of
                as many bytes is timed beside it. None: a call's overhead or arithmetic does, and
                inputs may lie in the cache.
            peers: builds the peers' functions of a case.
        """
        if benchmark.disabled:
            for way in (fn, torch_fn) if torch_fn else (fn,):
                way(cases[0])
            benchmark.pedantic(lambda: None)
            return
        cold = bound is not None
        kind = None if bound is None else bound if device.name == "cpu" else "copy"
        own = measure.Contestant(device, fn, cases, cold)
        rivals: dict[str, measure.Contestant] = {}
        failed: dict[str, str] = {}
        if kind is not None:
            rivals["plain"] = measure.Contestant(device, *device.plain(kind, num_bytes), cold)
        if torch_fn is not None:
            rivals["torch"] = measure.Contestant(device, torch_fn, cases, cold)
        try:
            for name, peer in peers().items():
                rivals[name] = measure.Contestant(device, peer, cases, cold)
        except Exception as error:  # another project's installation must not cost us our own row
            failed["peers"] = f"{type(error).__name__}: {error}".splitlines()[0]
        flush_s = statistics.median(device.seconds(device.flush) for _ in range(3)) if cold else 0.0

        def between() -> None:
            for rival in rivals.values():
                rival.round()
            own.ready()

        budget_s = request.config.getoption("--row-seconds")
        rounds = measure.rounds_within([own, *rivals.values()], flush_s, budget_s)
        benchmark.pedantic(own.run, setup=between, rounds=rounds, warmup_rounds=1)
        stats = benchmark.stats.stats
        median_s = stats.median
        gb_per_s = num_bytes / median_s / 1e9
        bandwidth = {k: v / 1e9 for k, v in device.bandwidth.items()} if kind else {}
        row = {
            "op": op,
            "variant": f"{variant} {_isa}".strip(),
            "device": device.name,
            "shape": shape,
            "note": note,
            "time_us": median_s * 1e6,
            "spread": stats.iqr / median_s,
            "bytes": num_bytes,
            "gb_per_s": gb_per_s,
            "bound": kind,
            "fraction_of_bandwidth": gb_per_s / bandwidth[kind] if kind else None,
            "bandwidth_gb_per_s": bandwidth,
            "fraction_of_plain": rivals["plain"].median_s / median_s if kind else None,
            "times_as_fast_as": {
                name: rival.median_s / median_s for name, rival in rivals.items() if name != "plain"
            },
            "timed_by": own.how,
            "calls_per_round": own.calls,
            "failed": failed,
        }
        benchmark.extra_info.update(row)
        _ROWS.append(row)
        if row_file is not None:
            row_file.add(row)

    return run


def case_of(row: table.Row) -> str:
    return " ".join(f"{row['op']} {row['variant']} {label(row['shape'])}".split())


def bandwidth_of(device: str) -> dict[str, float]:
    """As measured in this run, if any row asked for it; GB/s."""
    measured = (row["bandwidth_gb_per_s"] for row in _ROWS if row["device"] == device)
    return next((speeds for speeds in measured if speeds), {})


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """What a reader needs to judge the numbers; nothing that names the computer or its user."""
    machine_info.pop("node", None)
    cpu = machine_info.get("cpu", {})
    machine_info["cpu"] = {k: cpu[k] for k in ("brand_raw", "arch", "count") if k in cpu}
    machine_info["inferlab"] = describe_run(config)


def describe_run(config: pytest.Config) -> dict[str, Any]:
    """Machine, versions and command of a run; bandwidths as far as they are measured."""
    arguments = [
        str(a)
        for a in config.invocation_params.args
        if not str(a).startswith(("--benchmark-json", "--rows"))
    ]
    return {
        **describe_environment(),
        "build": _C.build_info(),
        "torch_cuda": torch.version.cuda,
        "peers": peer_ops.versions(),
        "command": "pytest " + shlex.join(arguments),
        "devices": {
            name: {
                "bandwidth_gb_per_s": bandwidth_of(name),
                "flush_bytes": device.flush_bytes,
            }
            for name, device in _DEVICES.items()
        },
    }


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: Any) -> None:
    for name in ("project", "branch"):
        commit_info.pop(name, None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: Any) -> None:
    for bench in output_json["benchmarks"]:
        bench["stats"].pop("data", None)  # quartiles are kept; single samples nobody reads


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name in _DEVICES:
        rows = [row for row in _ROWS if row["device"] == name]
        if not rows:
            continue
        who = f"{_C.num_threads()} threads, {_C.active_isa()}"
        if name == "cuda":
            who = torch.cuda.get_device_name(0)
        for kind, speed in bandwidth_of(name).items():
            who += f"; {kind} {speed:.1f} GB/s"
        terminalreporter.section(f"{name}: {who}")
        for line in table.text(rows):
            terminalreporter.write_line(line)
    for row in _ROWS:
        for who, why in row["failed"].items():
            terminalreporter.write_line(f"{case_of(row)}: {who} failed: {why}")
