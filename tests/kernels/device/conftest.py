"""`backend`: every test of this folder runs on each accelerator's kernels that can be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers import shim_build
from helpers.backends import Backend
from inferlab.kernels import _registry


@pytest.fixture(scope="session")
def cuda_shim(request: pytest.FixtureRequest):
    """The module whose CUDA kernels run on the CPU."""
    path = request.config.getoption("--cuda-shim")
    if path is None:
        if shutil.which(shim_build.COMPILER) is None:
            pytest.skip(f"{shim_build.COMPILER} is not installed")
        path = shim_build.build()
    return shim_build.load(Path(path))


@pytest.fixture(params=["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cuda":
        if not (torch.cuda.is_available() and "cuda" in _registry.BACKENDS):
            pytest.skip("no CUDA device, or built without CUDA")
        return Backend("cuda", "cuda")
    return Backend("cuda-shim", "cpu", request.getfixturevalue("cuda_shim"))
