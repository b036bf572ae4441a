"""`backend`: every test of this folder runs on each accelerator's kernels that can be had."""

from __future__ import annotations

import pytest
import torch

from helpers.backends import Backend
from inferlab.kernels import _registry


@pytest.fixture(params=["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cuda":
        if not (torch.cuda.is_available() and "cuda" in _registry.BACKENDS):
            pytest.skip("no CUDA device, or built without CUDA")
        return Backend("cuda", "cuda")
    return Backend("cuda-shim", "cpu", request.getfixturevalue("cuda_shim"))
