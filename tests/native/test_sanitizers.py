"""All device tests again, on kernels compiled with AddressSanitizer and UBSan, and with TSan."""

from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from helpers import shim_build, shim_run

# The slowest first: two of them run at a time.
RUNS = [(b, v) for v in ("tsan", "asan") for b in ("cuda-shim", "metal-shim")]
assert {v for _, v in RUNS} == set(shim_build.SANITIZER_LIBRARIES)


@pytest.fixture(scope="module")
def results(request) -> dict[tuple[str, str], Future]:
    chosen = {
        (item.callspec.params["backend"], item.callspec.params["variant"])
        for item in request.session.items
        if item.module is request.module
    }
    with ThreadPoolExecutor(2) as pool:
        yield {
            run: pool.submit(shim_run.device_tests, run[1], backend=run[0])
            for run in RUNS
            if run in chosen
        }


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "variant"), RUNS)
def test_device_tests_are_clean(backend, variant, results):
    shim_run.need_compiler(variant)
    result = results[backend, variant].result()
    print(result.stdout[-20000:])
    assert result.returncode == 0
