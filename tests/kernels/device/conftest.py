"""`backend`: every test of this folder runs on each accelerator's kernels that can be had."""

from __future__ import annotations

import pytest
import torch

<<<<<<< HEAD
=======
from helpers import metal_shim, shim_build
>>>>>>> a16ab38 (Metal: the KV ops, the tree and the layer's small ops; run .metal files on the CPU as fibres)
from helpers.backends import Backend
from inferlab.kernels import _registry


<<<<<<< HEAD
@pytest.fixture(params=["cuda-shim", pytest.param("cuda", marks=pytest.mark.gpu)])
=======
@pytest.fixture(scope="session")
def cuda_shim(request: pytest.FixtureRequest):
    """The module whose CUDA kernels run on the CPU."""
    path = request.config.getoption("--cuda-shim")
    if path is None:
        if shutil.which(shim_build.COMPILER) is None:
            pytest.skip(f"{shim_build.COMPILER} is not installed")
        path = shim_build.build()
    return shim_build.load(Path(path))


@pytest.fixture(scope="session")
def metal_ops(request: pytest.FixtureRequest):
    """Metal's ops, whose kernels run on the CPU."""
    if shutil.which(shim_build.COMPILER) is None:
        pytest.skip(f"{shim_build.COMPILER} is not installed")
    return metal_shim.metal_ops(request.config.getoption("--metal-shim"))


BACKENDS = [
    "cuda-shim",
    "metal-shim",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("mps", marks=pytest.mark.mps),
]


@pytest.fixture(params=BACKENDS)
>>>>>>> a16ab38 (Metal: the KV ops, the tree and the layer's small ops; run .metal files on the CPU as fibres)
def backend(request: pytest.FixtureRequest) -> Backend:
    match request.param:
        case "cuda-shim":
            return Backend("cuda-shim", "cpu", request.getfixturevalue("cuda_shim"))
        case "metal-shim":
            return Backend("metal-shim", "cpu", request.getfixturevalue("metal_ops"))
        case "mps":
            if not torch.backends.mps.is_available():
                pytest.skip("no Apple GPU")
            return Backend("mps", "mps")
    if not (torch.cuda.is_available() and "cuda" in _registry.BACKENDS):
        pytest.skip("no CUDA device, or built without CUDA")
    return Backend("cuda", "cuda")
