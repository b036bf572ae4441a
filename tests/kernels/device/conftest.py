"""`backend`: every test of this folder runs on each accelerator's kernels that can be had."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from helpers.backends import Backend
from inferlab.kernels import _registry

BACKENDS = [
    "cuda-shim",
    "metal-shim",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("mps", marks=pytest.mark.mps),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    name = request.param
    if name == "cuda-shim":
        return Backend(name, "cpu", request.getfixturevalue("cuda_shim"))
    if name == "metal-shim":
        return Backend(name, "cpu", request.getfixturevalue("metal_ops"))
    if name == "mps" and not torch.backends.mps.is_available():
        pytest.skip("no Apple GPU")
    if name == "cuda" and not (torch.cuda.is_available() and name in _registry.BACKENDS):
        pytest.skip("no CUDA device, or built without CUDA")
    return Backend(name, name)


@pytest.fixture(autouse=True)
def _usable_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fault spoils CUDA for the rest of the process: no later test may be blamed for it."""
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid} has spoilt the CUDA device: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message, returncode=1)
        print(message, file=sys.stderr, flush=True)
        time.sleep(0.5)  # the test's own report is on its way
        os._exit(1)  # the worker is replaced
