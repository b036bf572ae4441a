"""What a call costs beyond its work: each op on the smallest input it takes, CPU.

Names give the tensors that cross the binding, inputs and outputs, and the bound that a call should
keep to: 3 us + 0.5 us per tensor. The time is that of the public function: argument checks, the
allocation of results where it has any, and an amount of work next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from inferlab import kernels
from inferlab.kernels import SamplingTensors, build_tree

HEADS, DIM, VOCAB, PAGE_SIZE = 1, 8, 16, 16


def tree() -> dict[str, Any]:
    """One node, and logits for it."""
    return {
        "logits": torch.randn(1, 1, VOCAB),
        "tokens": torch.zeros(1, 1, dtype=torch.int32),
        "links": build_tree(torch.tensor([[-1]], dtype=torch.int32)),
        "seq_lens": torch.tensor([3], dtype=torch.int32),
        "sampling": SamplingTensors.of(1, temperature=0.0),
    }


def given(sampling: SamplingTensors) -> int:
    return sum(t is not None for t in sampling.flat)


def cases() -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> (tensors that cross the binding, call)."""
    row = torch.randn(1, 1, HEADS, DIM)
    k, v = (torch.zeros(2, PAGE_SIZE, HEADS, DIM) for _ in range(2))
    cache_k, cache_v = k[None], v[None]
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    lens, one = torch.tensor([3], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    zero, node = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    gathered = torch.empty(1, 1, HEADS, DIM)
    x, weight = torch.randn(1, 16), torch.randn(16, 16)
    packed = kernels.pack(weight, 8)
    angle = torch.zeros(1, 1, DIM)
    parents = torch.tensor([[-1]], dtype=torch.int32)
    t = tree()
    settings = t["sampling"]
    walk = t["logits"], t["tokens"], t["links"], t["seq_lens"], settings
    positions = torch.zeros(1, dtype=torch.int64)
    return {
        "build_tree": (5, lambda: build_tree(parents)),
        "kv_append": (6, lambda: kernels.kv_append(row, row, k, v, table, lens)),
        "kv_compact": (6, lambda: kernels.kv_compact(cache_k, cache_v, table, lens, node, one)),
        "kv_gather": (4, lambda: kernels.kv_gather(k, table, one, 1, out=gathered)),
        "kv_copy_pages": (4, lambda: kernels.kv_copy_pages(cache_k, cache_v, zero, one)),
        "paged_tree_attention": (
            6,
            lambda: kernels.paged_tree_attention(row, k, v, table, lens, None, scale=1.0),
        ),
        "rms_norm": (3, lambda: kernels.rms_norm(x, x[0])),
        "silu_mul": (2, lambda: kernels.silu_mul(x)),
        "linear": (3, lambda: kernels.linear(x, weight)),
        "packed_linear": (3, lambda: kernels.packed_linear(x, packed)),
        "rope_append": (
            9,
            lambda: kernels.rope_append(row, row, row, angle, angle, k, v, table, lens),
        ),
        "sample": (
            3 + given(settings),
            lambda: kernels.sample(t["logits"][:, 0], positions, settings),
        ),
        "verify_tree_match": (8 + given(settings), lambda: kernels.verify_tree_match(*walk)),
        "verify_tree_rejection": (
            9 + given(settings),
            lambda: kernels.verify_tree_rejection(walk[0], walk[0], *walk[1:]),
        ),
        "verify_tree_lossy": (
            8 + given(settings),
            lambda: kernels.verify_tree_lossy(*walk, "topk_agree", 2),
        ),
    }


@pytest.mark.parametrize("op", list(cases()))
def bench_call(kernel_bench: Any, device: Any, op: str) -> None:
    if device.name != "cpu":
        pytest.skip("the binding is the same; a call on CUDA only queues its work")
    tensors, call = cases()[op]
    shape, note = {"tensors": tensors}, f"bound {3 + 0.5 * tensors:.1f} us"
    calls = [None]
    kernel_bench("overhead", op, shape, lambda _: call(), calls, num_bytes=0, bound=None, note=note)
