"""What the ops refuse on accelerators: exceptions that name the argument, and a usable process."""

from __future__ import annotations

import pytest
import torch

from inferlab import kernels
from inferlab.kernels import _registry


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


X = torch.zeros(1, 3, 2, 8)
POOL = torch.zeros(4, 4, 2, 8)
CACHE = POOL[None]
TABLE = i32(0, 1)[None]
LENS = i32(0)
PATH = i32(0, 2)[None]
COUNT = i32(2)
ANGLES = torch.zeros(1, 3, 8)
IDS = i32(0)
PARENTS = i32(-1, 0)[None]

# op -> good arguments by name, all tensors
CALLS = {
    kernels.kv_append: {
        "k": X, "v": X, "k_pages": POOL, "v_pages": POOL, "block_table": TABLE, "seq_lens": LENS,
    },
    kernels.kv_compact: {
        "k_cache": CACHE, "v_cache": CACHE, "block_table": TABLE, "seq_lens": LENS,
        "accepted_nodes": PATH, "num_accepted": COUNT,
    },
    kernels.kv_copy_pages: {"k_cache": CACHE, "v_cache": CACHE, "src": IDS, "dst": IDS},
    kernels.rms_norm: {"x": X, "weight": torch.zeros(8)},
    kernels.rope_append: {
        "q": X, "k": X, "v": X, "cos": ANGLES, "sin": ANGLES, "k_pages": POOL, "v_pages": POOL,
        "block_table": TABLE, "seq_lens": LENS,
    },
    kernels.build_tree: {"parents": PARENTS},
}  # fmt: skip
ARGUMENTS = [(op, name) for op, arguments in CALLS.items() for name in arguments]
IDS_OF_ARGUMENTS = [f"{op.__name__}-{name}" for op, name in ARGUMENTS]


def with_changed(op, name, change):
    return [change(t) if key == name else t for key, t in CALLS[op].items()]


@pytest.mark.parametrize(("op", "name"), ARGUMENTS, ids=IDS_OF_ARGUMENTS)
def test_a_wrong_shape_is_named(backend, op, name):
    if (op, name) == (kernels.rms_norm, "x"):
        pytest.skip("takes any shape")
    with pytest.raises(ValueError, match=rf"^{name} has shape \[1, .*; it must "):
        backend.call(op, *with_changed(op, name, lambda t: t[None]))
    backend.call(op, *CALLS[op].values())


@pytest.mark.parametrize(("op", "name"), ARGUMENTS, ids=IDS_OF_ARGUMENTS)
def test_a_wrong_dtype_is_named(backend, op, name):
    with pytest.raises(TypeError, match=rf"^{name} has dtype float64; it must be "):
        backend.call(op, *with_changed(op, name, torch.Tensor.double))
    backend.call(op, *CALLS[op].values())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in _registry.BACKENDS, reason="no CUDA device"
)
@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS, ids=IDS_OF_ARGUMENTS)
def test_an_argument_on_another_device_is_named(op, name, home):
    if len(CALLS[op]) == 1:
        pytest.skip("its only argument says where it runs")
    other = "cuda" if home == "cpu" else "cpu"
    good = [t.to(home) for t in CALLS[op].values()]
    mixed = [t.to(other if key == name else home) for key, t in CALLS[op].items()]
    with pytest.raises(
        ValueError, match=r"^\w+ must be on (the CPU|CUDA device 0), like the other"
    ):
        op(*mixed)
    op(*good)
    torch.cuda.synchronize()


def test_a_launch_that_cannot_be_leaves_the_process_usable(backend):
    """More layers than a grid has planes: refused with an exception, and the next call works."""
    many = torch.zeros(40000, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="kv_copy_pages was called with arguments it does not"):
        backend.call(kernels.kv_copy_pages, many, many, IDS, IDS)
    k = torch.randn(1, 2, 4, 1, 8)
    got = backend.call_in_place(kernels.kv_copy_pages, k, -k, i32(0), i32(1))
    assert torch.equal(got[0][0, 1], k[0, 0])
    assert torch.equal(got[1][0, 1], -k[0, 0])
