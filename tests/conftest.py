"""Settings of all tests: no downloads, no busy waiting. Makes ``helpers`` importable from tests."""

import atexit
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# pytest -n: two torch programs with two threads each slow each other down on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# What steps cost is measured once in a run, and not left behind.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="inferlab-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# Idle OpenMP threads sleep: spinning ones starve each other when tests share cores with anything.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# --hypothesis-profile: `ci` gives the same examples in every run. `first-failure` is for tests that
# are to fail.
settings.register_profile("ci", derandomize=True, print_blob=True)
settings.register_profile("first-failure", derandomize=True, phases=[Phase.generate])


@pytest.fixture(autouse=True)
def log_level():
    """What a command's ``--log-level`` sets does not outlive its test."""
    logger = logging.getLogger("inferlab")
    before = logger.level
    yield
    logger.setLevel(before)


def pytest_addoption(parser):
    parser.addoption(
        "--cuda-shim",
        metavar="PATH",
        help="a module built by tests/helpers/shim_build.py, e.g. one with a sanitizer",
    )
    parser.addoption(
        "--metal-shim",
        metavar="VARIANT",
        default="plain",
        choices=("plain", "asan", "tsan"),
        help="the sanitizer that Metal kernels are compiled with for the CPU",
    )
    parser.addoption(
        "--each-value",
        action="store_true",
        help="device tests: not all combinations of their parameters, but every value of each",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    # Not an option of setup.cfg: with any --dist pytest-benchmark does not measure.
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadgroup"


def pytest_collection_modifyitems(config, items):
    if not re.search(r"\bfull\b", config.getoption("-m")):
        left_out = [item for item in items if item.get_closest_marker("full")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("full")]
    if hasattr(config, "workerinput"):
        # What takes long is not to be left for one worker at the end.
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """--dist loadgroup: a group's tests stay together, and those of a file that are in none."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByGroupOrFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            _, at, group = nodeid[nodeid.rfind("]") + 1 :].rpartition("@")
            return group if at else nodeid.split("::", 1)[0]

    config.option.loadscopereorder = False  # the order of the tests is the right one
    return ByGroupOrFile(config, log)


@pytest.fixture(scope="session")
def cuda_shim(request):
    """The module whose CUDA kernels run on the CPU."""
    from helpers import shim_build

    path = request.config.getoption("--cuda-shim")
    if path is None:
        if shutil.which(shim_build.COMPILER) is None:
            pytest.skip(f"{shim_build.COMPILER} is not installed")
        path = shim_build.build()
    return shim_build.load(Path(path))


@pytest.fixture(scope="session")
def metal_ops(request):
    """Metal's ops, whose kernels run on the CPU."""
    from helpers import metal_shim, shim_build

    if shutil.which(shim_build.COMPILER) is None:
        pytest.skip(f"{shim_build.COMPILER} is not installed")
    return metal_shim.metal_ops(request.config.getoption("--metal-shim"))
