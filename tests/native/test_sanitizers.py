"""All device tests again, on kernels compiled with AddressSanitizer and UBSan, and with TSan."""

import pytest

from helpers import shim_build, shim_run


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(shim_build.SANITIZER_LIBRARIES))
@pytest.mark.parametrize("backend", ["cuda-shim", "metal-shim"])
def test_device_tests_are_clean(backend, variant):
    shim_run.need_compiler(variant)
    result = shim_run.device_tests(variant, backend=backend)
    print(result.stdout[-20000:])
    assert result.returncode == 0
