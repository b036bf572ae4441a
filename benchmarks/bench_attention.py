"""paged_tree_attention: memory-bound decoding, tiny shapes where a call's overhead counts, prefill.

A chain has no ancestor words (each node sees those before it), a binary tree has. torch:
scaled_dot_product_attention on the same K and V laid out densely, which it need not gather.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import floors
import peers
import torch_ways
from inferlab.kernels import paged_tree_attention
from inputs import PAGE_SIZE, attention_case
from inputs import attention_shape as shape
from shapes import DTYPES, Shape, shapes

CPU_MAX_BYTES = 1 << 30  # of K and V in one case: what a sweep on the CPU leaves out


def run(kernel_bench: Any, device: Any, variant: str, s: Shape, bound: str | None) -> None:
    q_heads, kv_heads = s["Hq"], s["Hkv"]
    size, scale = DTYPES[s["dtype"]].itemsize, s["D"] ** -0.5
    kv_bytes = 2 * s["B"] * (s["L"] + s["N"]) * kv_heads * s["D"] * size
    if device.name == "cpu" and kv_bytes > CPU_MAX_BYTES:
        pytest.skip("more K and V than is reasonable on a CPU")
    cases = device.cases(lambda: attention_case(device, s), 2 * kv_bytes)
    first = cases[0]
    sdpa_mask = first.mask
    if first.mask is None and s["N"] > 1:  # a chain behind its prefix
        ones = torch.ones(s["N"], s["L"] + s["N"], dtype=torch.bool, device=device.torch)
        sdpa_mask = ones.tril(s["L"])
    kernel_bench(
        "paged_tree_attention",
        variant,
        s,
        lambda c: paged_tree_attention(
            c.q, c.k_pages, c.v_pages, c.table, c.lens, c.ancestors, scale=scale
        ),
        cases,
        num_bytes=floors.attention(
            s["B"], s["N"], q_heads, kv_heads, s["D"], s["L"], size, PAGE_SIZE,
            tree=first.ancestors is not None,
        ),
        bound=bound,
        torch_fn=lambda c: torch_ways.attention(c.q, c.keys, c.values, sdpa_mask),
        peers=lambda: peers.attention(device.torch, cases, scale),
    )  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    shapes(
        [
            shape(32, 1, "chain", 32, 8, 128, 4096, "bf16"),
            shape(32, 16, "binary", 32, 8, 128, 4096, "bf16"),
            shape(16, 1, "chain", 8, 8, 128, 4096, "f32"),
            shape(16, 1, "chain", 8, 8, 128, 4096, "bf16"),
            shape(16, 1, "chain", 32, 8, 128, 4096, "f32"),
            shape(16, 4, "chain", 8, 8, 64, 4096, "bf16"),
            shape(1, 1, "chain", 8, 8, 128, 32768, "f32"),
            shape(1, 1, "chain", 8, 8, 128, 32768, "bf16"),
            shape(1, 64, "binary", 32, 8, 128, 4096, "bf16"),
        ],
        sweep=[
            shape(b, n, tree, hq, hkv, d, length, dtype)
            for b in (1, 32)
            for n, tree in ((1, "chain"), (4, "chain"), (16, "binary"), (64, "binary"))
            for hq, hkv, d in ((8, 8, 64), (32, 8, 128), (64, 8, 128))
            for length in (1024, 4096, 16384)
            for dtype in ("f32", "bf16")
        ],
    ),
)
def bench_decode(kernel_bench: Any, device: Any, shape: Shape) -> None:
    run(kernel_bench, device, "decode", shape, bound="read")


@pytest.mark.parametrize(
    "shape",
    shapes(
        [
            shape(1, 1, "chain", 4, 4, 32, 32, "f32"),
            shape(1, 5, "chain", 8, 4, 32, 100, "f32"),
            shape(1, 1, "chain", 8, 8, 64, 300, "f32"),
            shape(1, 32, "binary", 8, 8, 64, 300, "f32"),
        ]
    ),
)
def bench_tiny(kernel_bench: Any, device: Any, shape: Shape) -> None:
    run(kernel_bench, device, "tiny", shape, bound=None)


@pytest.mark.parametrize(
    "shape",
    shapes(
        [
            shape(1, 100, "chain", 8, 4, 64, 0, "f32"),
            shape(1, 500, "chain", 8, 8, 64, 0, "f32"),
            shape(1, 1000, "chain", 16, 8, 128, 0, "bf16"),
        ],
        sweep=[
            shape(1, n, "chain", 32, 8, 128, length, dtype)
            for n in (128, 512, 2048)
            for length in (0, 4096)
            for dtype in ("f32", "bf16")
        ],
    ),
)
def bench_prefill(kernel_bench: Any, device: Any, shape: Shape) -> None:
    run(kernel_bench, device, "prefill", shape, bound=None)
