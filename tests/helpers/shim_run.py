"""Runs device tests in a process of their own, on a shim that has a sanitizer or is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers import shim_build

FOLDER = shim_build.ROOT / "tests" / "kernels" / "device"


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
) -> subprocess.CompletedProcess[str]:
    """pytest on `tests` below tests/kernels/device, up to the first failure.

    Arguments:
    module: the CUDA shim's, if not the one that is built from csrc/cuda.

    Returns: its exit status and, in stdout, all it said; a sanitizer's report is part of that.
    """
    # A process of its own, whatever workers and options the tests around it have.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= shim_build.SANITIZER_OPTIONS
    # Torch's OpenMP threads are not instrumented: TSan would see races between them.
    env["OMP_NUM_THREADS"] = "1"
    if variant in shim_build.SANITIZER_LIBRARIES:
        env["LD_PRELOAD"] = " ".join(map(str, shim_build.runtime_libraries(variant)))
    if backend == "metal-shim":
        shim = ["--metal-shim", variant]
    else:
        shim = ["--cuda-shim", str(module or shim_build.build(variant))]
    if variant in shim_build.SANITIZER_LIBRARIES:
        shim += ["-m", "not distribution"]
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
        # Not the file descriptors: a process that a sanitizer ends would take its report along.
        *("--capture=sys", "--tb=short", "--durations=10", "-k", backend, *shim),
        *(str(FOLDER / test) for test in tests),
    ]
    return subprocess.run(
        command,
        cwd=shim_build.ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
