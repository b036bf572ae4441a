"""`backend`: every test of this folder runs on each accelerator's kernels that can be had."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

from helpers.backends import Backend
from helpers.pairwise import each_value
from inferlab.kernels import _registry

BACKENDS = [
    "cuda-shim",
    "metal-shim",
    "fallback",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("mps", marks=pytest.mark.mps),
]


# What kernels promise and torch operations do not: rows that are the same bits in any batch,
# workspaces, nothing touched where ids and lengths are out of range.
KERNELS_ONLY = {
    "test_a_draft_of_another_half_precision_is_refused",
    "test_a_launch_that_cannot_be_leaves_the_process_usable",
    "test_a_row_is_the_same_alone_and_in_a_batch",
    "test_append_skips_slots_that_do_not_exist",
    "test_compact_skips_rows_that_do_not_exist",
    "test_copy_pages_skips_pages_that_do_not_exist",
    "test_gather_gives_zeros_for_slots_that_do_not_exist",
    "test_links_that_do_not_go_up_end_the_walk",
    "test_one_workspace_for_all_calls",
    "test_rope_append_skips_slots_that_do_not_exist",
    "test_the_workspace_may_hold_anything_and_be_used_again",
    "test_tokens_out_of_the_vocabulary_are_never_accepted",
    "test_values_out_of_range_are_skipped",
    "test_values_out_of_range_touch_no_memory_that_is_not_theirs",
    "test_what_is_no_tree_becomes_padding",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--each-value: of a test's rows as many as hold every value of every parameter."""
    if not config.getoption("--each-value"):
        return
    rows = defaultdict(list)
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        rows[item.nodeid.partition("[")[0], params.get("backend")].append((item, params))
    kept = set()
    for of_one in rows.values():
        kept.update(of_one[i][0] for i in each_value([params for _, params in of_one]))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    name = request.param
    if name == "cuda-shim":
        return Backend(name, "cpu", request.getfixturevalue("cuda_shim"))
    if name == "metal-shim":
        return Backend(name, "cpu", request.getfixturevalue("metal_ops"))
    if name == "fallback":
        if request.node.originalname in KERNELS_ONLY:
            pytest.skip("asks for what only kernels promise")
        return Backend(name, "cpu", _registry.FALLBACK)
    if name == "mps" and not torch.backends.mps.is_available():
        pytest.skip("no Apple GPU")
    if name == "cuda" and not (torch.cuda.is_available() and name in _registry.BACKENDS):
        pytest.skip("no CUDA device, or built without CUDA")
    return Backend(name, name)


@pytest.fixture(autouse=True)
def _usable_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fault spoils CUDA for the rest of the process: no later test may be blamed for it."""
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid} has spoilt the CUDA device: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message, returncode=1)
        print(message, file=sys.stderr, flush=True)
        time.sleep(0.5)  # the test's own report is on its way
        os._exit(1)  # the worker is replaced
