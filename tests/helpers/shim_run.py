"""Runs device tests in a process of their own, on a shim that has a sanitizer or is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers import shim_build

FOLDER = shim_build.ROOT / "tests" / "kernels" / "device"


def device_tests(module: Path, variant: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on tests/kernels/device over a module of the CUDA shim: all tests, or those named.

    Returns: its exit status and, in stdout, all it said; a sanitizer's report is part of that.
    """
    return _run(["-k", "cuda-shim", "--cuda-shim", str(module)], variant, arguments)


def metal_device_tests(variant: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same over Metal's kernels."""
    return _run(["-k", "metal-shim", "--metal-shim", variant], variant, arguments)


def _run(
    selection: list[str], variant: str, arguments: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **shim_build.SANITIZER_OPTIONS}
    # Torch's OpenMP threads are not instrumented: TSan would see races between them.
    env["OMP_NUM_THREADS"] = "1"
    if variant in shim_build.RUNTIME_LIBRARIES:
        env["LD_PRELOAD"] = str(shim_build.runtime_library(variant))
    tests = [a for a in arguments if not a.startswith("-")] or [""]
    options = [a for a in arguments if a.startswith("-")]
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        # Not the file descriptors: a process that a sanitizer ends would take its report along.
        *("--capture=sys", "--tb=short", *selection),
        *options,
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
