"""paged_tree_attention: memory-bound decoding, tiny shapes where a call's overhead counts, prefill.

Bytes: K and V of the positions that are read. torch: scaled_dot_product_attention on the same K and
V laid out densely, [B, Hkv, L, D], which it needs not gather from pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from inferlab.kernels import advise_large_pages, paged_tree_attention

PAGE_SIZE = 16


def shape(batch: int, nodes: int, q_heads: int, kv_heads: int, dim: int, length: int) -> Any:
    sizes = (batch, nodes, q_heads, kv_heads, dim, length)
    return pytest.param(sizes, id=f"B{batch}_N{nodes}_H{q_heads}-{kv_heads}_D{dim}_L{length}")


def inputs(
    batch: int, nodes: int, q_heads: int, kv_heads: int, dim: int, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    pages_each = (length + nodes + PAGE_SIZE - 1) // PAGE_SIZE
    table = torch.randperm(batch * pages_each).int().reshape(batch, pages_each)
    pool = (batch * pages_each, PAGE_SIZE, kv_heads, dim)
    k, v = (torch.zeros(pool, dtype=dtype) for _ in range(2))
    for pages in (k, v):
        advise_large_pages(pages)  # as KVCache does
        pages.copy_(torch.randn(pool))
    q = torch.randn(batch, q_heads, nodes, dim).to(dtype).transpose(1, 2)
    return q, k, v, table, torch.full((batch,), length, dtype=torch.int32)


def dense(pages: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    return pages[table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous()


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> Callable[[], object]:
    nodes, total = q.shape[1], k.shape[2]
    mask = torch.ones(nodes, total, dtype=torch.bool).tril(length) if nodes > 1 else None
    rows = q.transpose(1, 2)
    gqa = rows.shape[1] != k.shape[1]
    if length == 0:
        return lambda: F.scaled_dot_product_attention(rows, k, v, is_causal=True, enable_gqa=gqa)
    return lambda: F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, enable_gqa=gqa)


def run(
    kernel_bench: Any, request: Any, dtype: torch.dtype, sizes: tuple[int, ...], bound: bool
) -> None:
    q, k, v, table, lens = inputs(*sizes, dtype)
    batch, nodes, _, kv_heads, dim, length = sizes
    num_bytes = 2 * batch * (length + nodes) * kv_heads * dim * k.element_size()
    keys, values = (dense(x, table, length + nodes) for x in (k, v))
    kernel_bench(
        f"attention {request.node.callspec.id}",
        lambda: paged_tree_attention(q, k, v, table, lens, None, scale=dim**-0.5),
        num_bytes=num_bytes if bound else 0,
        torch_fn=sdpa(q, keys, values, length),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "sizes",
    [
        shape(16, 1, 8, 8, 128, 4096),
        shape(16, 1, 32, 8, 128, 4096),
        shape(16, 4, 8, 8, 64, 4096),
        shape(1, 1, 8, 8, 128, 32768),
    ],
)
def bench_decode_from_memory(
    kernel_bench: Any, request: Any, dtype: torch.dtype, sizes: Any
) -> None:
    run(kernel_bench, request, dtype, sizes, bound=True)


@pytest.mark.parametrize(
    "sizes",
    [
        shape(1, 1, 4, 4, 32, 32),
        shape(1, 5, 8, 4, 32, 100),
        shape(1, 1, 8, 8, 64, 300),
        shape(1, 32, 8, 8, 64, 300),
    ],
)
def bench_tiny(kernel_bench: Any, request: Any, sizes: Any) -> None:
    run(kernel_bench, request, torch.float32, sizes, bound=False)


@pytest.mark.parametrize(
    "sizes",
    [
        shape(1, 100, 8, 4, 64, 0),
        shape(1, 500, 8, 8, 64, 0),
        shape(1, 1000, 16, 8, 128, 0),
    ],
)
def bench_prefill(kernel_bench: Any, request: Any, sizes: Any) -> None:
    run(kernel_bench, request, torch.float32, sizes, bound=False)
