"""`backend`: every test of this folder runs on each accelerator's kernels that can be had."""

from __future__ import annotations

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
