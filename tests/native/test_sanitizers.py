"""All device tests again, on kernels compiled with AddressSanitizer and UBSan, and with TSan."""

import shutil

import pytest

from helpers import shim_build, shim_run


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(shim_build.RUNTIME_LIBRARIES))
@pytest.mark.parametrize("backend", ["cuda", "metal"])
def test_device_tests_are_clean(backend, variant):
    if shutil.which(shim_build.COMPILER) is None:
        pytest.skip(f"{shim_build.COMPILER} is not installed")
    if shim_build.runtime_library(variant) is None:
        pytest.skip(f"{shim_build.COMPILER} comes without the sanitizer's library")
    if backend == "cuda":
        result = shim_run.device_tests(shim_build.build(variant), variant, "-x")
    else:
        result = shim_run.metal_device_tests(variant, "-x")
    assert result.returncode == 0, result.stdout[-20000:]
