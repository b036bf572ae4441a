"""All device tests again, on kernels compiled with AddressSanitizer and UBSan, and with TSan.

Races hang on the path through a kernel, hardly on combinations of values. So under TSan, by far the
slowest, a test runs with every value of each of its parameters, and with all combinations in
``pytest -m full``.
"""

from __future__ import annotations

import pytest

from helpers import shim_build, shim_run
from helpers.ahead import Ahead

# What takes long apart, so that it spreads over workers.
PARTS = {
    "attention": ["test_device_attention.py"],
    "rows": sorted(
        path.name
        for op in ("sample", "verify*")
        for path in shim_run.FOLDER.glob(f"test_*_{op}.py")
    ),
}
PARTS["rest"] = sorted(
    {path.name for path in shim_run.FOLDER.glob("test_*.py")}.difference(*PARTS.values())
)
NAMES = ("backend", "variant", "part", "combinations")
# The slowest first: two of them run at a time.
RUNS = [
    pytest.param(
        backend,
        variant,
        part,
        combinations,
        marks=[
            pytest.mark.xdist_group(f"{variant}-{backend}-{'rows' if part == 'rows' else 'rest'}"),
            *([pytest.mark.full] if (variant, combinations) == ("tsan", "all") else []),
        ],
    )
    for variant, combinations in (("tsan", "few"), ("asan", "all"), ("tsan", "all"))
    for backend in ("cuda-shim", "metal-shim")
    for part in PARTS
]
assert {run.values[1] for run in RUNS} == set(shim_build.SANITIZER_LIBRARIES)


@pytest.fixture(scope="module")
def results(request):
    def run(job):
        backend, variant, part, combinations = job
        options = ["--each-value"] if combinations == "few" else []
        return shim_run.device_tests(variant, PARTS[part], backend=backend, options=options)

    chosen = [
        tuple(item.callspec.params[name] for name in NAMES)
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    with Ahead(run, chosen, 2) as ahead:
        yield ahead


@pytest.mark.slow
@pytest.mark.parametrize(NAMES, RUNS)
def test_device_tests_are_clean(backend, variant, part, combinations, results):
    shim_run.need_compiler(variant)
    result = results[backend, variant, part, combinations]
    print(result.stdout[-20000:])
    assert result.returncode == 0


def test_every_device_test_is_in_one_part():
    files = [name for names in PARTS.values() for name in names]
    assert sorted(files) == sorted(path.name for path in shim_run.FOLDER.glob("test_*.py"))
