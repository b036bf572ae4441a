"""Runs device tests in processes of their own, on a shim that has a sanitizer or is broken.

Each is forked from a warm one (warm_pytest.py); there is one for each sanitizer at least, and as
many as there are runs at a time.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers import shim_build

FOLDER = shim_build.ROOT / "tests" / "kernels" / "device"

_idle: dict[str, list[subprocess.Popen[str]]] = defaultdict(list)  # by variant
_lock = threading.Lock()


def need_compiler(variant: str = "plain") -> None:
    """Skips the test where there is no compiler, or none with the variant's sanitizer."""
    if shutil.which(shim_build.COMPILER) is None:
        pytest.skip(f"{shim_build.COMPILER} is not installed")
    if variant in shim_build.SANITIZER_LIBRARIES and not shim_build.runtime_libraries(variant):
        pytest.skip(f"{shim_build.COMPILER} comes without the library of {variant}")


def device_tests(
    variant: str,
    tests: Sequence[str] = ("",),
    *,
    module: Path | None = None,
    backend: str = "cuda-shim",
    options: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """pytest on `tests` below tests/kernels/device, up to the first failure.

    Arguments:
    module: the CUDA shim's, if not the one that is built from csrc/cuda. It is expected to fail,
        so its smallest failing example is not looked for.
    options: for pytest.

    Returns: its exit status and, in stdout, all it said; a sanitizer's report is part of that.
    """
    if backend == "metal-shim":
        shim = ["--metal-shim", variant]
    else:
        shim = ["--cuda-shim", str(module or shim_build.build(variant))]
    if module is not None:
        shim += ["--hypothesis-profile", "first-failure"]
    if variant in shim_build.SANITIZER_LIBRARIES:
        shim += ["-m", "not numbers"]
    arguments = [
        *("-q", "-x", "-p", "no:cacheprovider"),
        # Not the file descriptors: a process that a sanitizer ends would take its report along.
        *("--capture=sys", "--tb=short", "--durations=10", "-k", backend, *shim, *options),
        "-Wignore::pytest.PytestAssertRewriteWarning",  # the warm process has imported the plugins
        *(str(FOLDER / test) for test in tests),
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        status = _run(variant, arguments, log)
        output = log.read_text(errors="replace")
    return subprocess.CompletedProcess(arguments, status, stdout=output)


def _run(variant: str, arguments: list[str], log: Path) -> int:
    with _lock:
        process = _idle[variant].pop() if _idle[variant] else _start(variant)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"the warm process for {variant} ended with {process.wait()}")
    with _lock:
        _idle[variant].append(process)
    return int(answer)


def _start(variant: str) -> subprocess.Popen[str]:
    # Its own settings, whatever workers and options the tests around it have.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= shim_build.SANITIZER_OPTIONS
    env["PYTHONPATH"] = os.pathsep.join(
        [str(shim_build.ROOT / "tests"), *filter(None, [env.get("PYTHONPATH")])]
    )
    # One thread, which alone a forked process has; and TSan would see races between the threads of
    # torch, which are not instrumented.
    env["OMP_NUM_THREADS"] = "1"
    if variant in shim_build.SANITIZER_LIBRARIES:
        env["LD_PRELOAD"] = " ".join(map(str, shim_build.runtime_libraries(variant)))
    return subprocess.Popen(
        [sys.executable, "-m", "helpers.warm_pytest"],
        cwd=shim_build.ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@atexit.register
def _end() -> None:
    for process in (p for idle in _idle.values() for p in idle):
        assert process.stdin is not None
        process.stdin.close()  # the end of its loop
        process.wait()
