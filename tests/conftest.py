"""Settings of all tests: no downloads, no busy waiting. Makes ``helpers`` importable from tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Idle OpenMP threads sleep: spinning ones starve each other when tests share cores with anything.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser):
    parser.addoption(
        "--cuda-shim",
        metavar="PATH",
        help="a module built by tests/helpers/shim_build.py, e.g. one with a sanitizer",
    )
