"""The tests can fail: every broken kernel of mutants.py is caught, by the test named in its id.

That they pass on the kernels themselves is seen in tests/kernels/device and test_sanitizers.py.
"""

import pytest
from mutants import MUTANTS

from helpers import shim_build, shim_run
from helpers.ahead import Ahead

pytestmark = pytest.mark.slow


def group(variant):
    """On one worker, which builds the variant's objects and warms a process for it."""
    return pytest.mark.xdist_group(f"{variant}-mutants")


@pytest.fixture(scope="module")
def builds(request, tmp_path_factory):
    """Modules of the mutants to be run: compiled ahead, while tests of the first ones run."""
    folder = tmp_path_factory.mktemp("mutants")

    def build(mutant):
        source = folder / mutant.name
        mutant.patch(shim_build.CUDA, source)
        return shim_build.build(mutant.variant, source, [mutant.source])

    chosen = {
        item.callspec.params.get("mutant")
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    }
    with Ahead(build, [m for m in MUTANTS if m in chosen], 1) as ahead:
        yield ahead


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, marks=group(m.variant), id=m.name) for m in MUTANTS]
)
def test_mutant_is_caught(mutant, builds):
    shim_run.need_compiler(mutant.variant)
    result = shim_run.device_tests(mutant.variant, [mutant.test], module=builds[mutant])
    if not mutant.caught_by(result.returncode, result.stdout):
        pytest.fail(f"{mutant.test} ended with {result.returncode}:\n{result.stdout[-10000:]}")


def test_every_patch_fits_its_source(tmp_path):
    for mutant in MUTANTS:
        mutant.patch(shim_build.CUDA, tmp_path / mutant.name)


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_every_mutant_is_compiled_from_a_source_of_its_own_change():
    for mutant in MUTANTS:
        source = shim_build.CUDA / mutant.source
        included = shim_build._sources(source, [shim_build.CUDA])
        assert shim_build.CUDA / mutant.file in included, mutant.name
