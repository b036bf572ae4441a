"""The tests can fail: every broken kernel of mutants.py is caught, by the test named in its id."""

from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from mutants import MUTANTS

from helpers import shim_build, shim_run

pytestmark = pytest.mark.slow
VARIANTS = sorted({m.variant for m in MUTANTS})


@pytest.fixture(scope="module")
def builds(request, tmp_path_factory) -> dict[str, Future]:
    """Modules of the mutants to be run: compiled ahead, while tests of the first ones run."""
    folder = tmp_path_factory.mktemp("mutants")
    chosen = {
        item.callspec.params.get("mutant")
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    }

    def build(mutant):
        source = folder / mutant.name
        mutant.patch(shim_build.CUDA, source)
        return shim_build.build(mutant.variant, source)

    with ThreadPoolExecutor(1) as pool:
        yield {m.name: pool.submit(build, m) for m in MUTANTS if m in chosen}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_themselves_pass(variant):
    shim_run.need_compiler(variant)
    tests = sorted({m.test for m in MUTANTS if m.variant == variant})
    result = shim_run.device_tests(variant, tests)
    assert result.returncode == 0, result.stdout[-10000:]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant, builds):
    shim_run.need_compiler(mutant.variant)
    module = builds[mutant.name].result()
    result = shim_run.device_tests(mutant.variant, [mutant.test], module=module)
    if not mutant.caught_by(result.returncode, result.stdout):
        pytest.fail(f"{mutant.test} ended with {result.returncode}:\n{result.stdout[-10000:]}")


def test_every_patch_fits_its_source(tmp_path):
    for mutant in MUTANTS:
        mutant.patch(shim_build.CUDA, tmp_path / mutant.name)


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
