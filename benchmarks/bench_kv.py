"""The KV ops. Bytes: what is read and what is written, each counted once.

torch: the reference's index arithmetic (gather, scatter) on the same pages.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inferlab.kernels import kv_append, kv_compact, kv_copy_pages, kv_gather, reference

LAYERS, PAGES, PAGE_SIZE, HEADS, DIM, BATCH = 4, 1024, 16, 8, 128, 8
LENGTH = PAGES // BATCH * PAGE_SIZE
DTYPE = torch.float32


@pytest.fixture(scope="module")
def caches() -> list[torch.Tensor]:
    return [torch.randn(LAYERS, PAGES, PAGE_SIZE, HEADS, DIM, dtype=DTYPE) for _ in range(2)]


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    return torch.randperm(PAGES).int().reshape(BATCH, -1)


def row_bytes(rows: int) -> int:
    return rows * HEADS * DIM * torch.tensor([], dtype=DTYPE).element_size()


def bench_append(kernel_bench: Any, caches: Any, table: Any) -> None:
    k, v = (torch.randn(BATCH, HEADS, LENGTH, DIM).transpose(1, 2) for _ in range(2))
    args = (k, v, caches[0][0], caches[1][0], table, torch.zeros(BATCH, dtype=torch.int32))
    kernel_bench(
        "kv_append",
        lambda: kv_append(*args),
        num_bytes=4 * row_bytes(BATCH * LENGTH),
        torch_fn=lambda: reference.kv_append(*args),
    )


def bench_append_one_row(kernel_bench: Any, caches: Any, table: Any) -> None:
    k = torch.randn(1, 1, HEADS, DIM)
    args = (k, k, caches[0][0], caches[1][0], table[:1], torch.tensor([37], dtype=torch.int32))
    kernel_bench(
        "kv_append of one row",
        lambda: kv_append(*args),
        num_bytes=0,
        torch_fn=lambda: reference.kv_append(*args),
    )


@pytest.mark.parametrize("accepted", [3, 128])
def bench_compact(kernel_bench: Any, caches: Any, table: Any, accepted: int) -> None:
    nodes = (torch.arange(accepted) * 2 + 1).int().repeat(BATCH, 1)
    counts = torch.full((BATCH,), accepted, dtype=torch.int32)
    args = (*caches, table, torch.full((BATCH,), 37, dtype=torch.int32), nodes, counts)
    kernel_bench(
        f"kv_compact of {accepted} rows",
        lambda: kv_compact(*args),
        num_bytes=4 * LAYERS * row_bytes(BATCH * accepted),
        torch_fn=lambda: reference.kv_compact(*args),
    )


def bench_gather(kernel_bench: Any, caches: Any, table: Any) -> None:
    lens = torch.full((BATCH,), LENGTH, dtype=torch.int32)
    out = torch.empty(BATCH, LENGTH, HEADS, DIM)
    kernel_bench(
        "kv_gather",
        lambda: kv_gather(caches[0][0], table, lens, LENGTH, out=out),
        num_bytes=2 * row_bytes(BATCH * LENGTH),
        torch_fn=lambda: reference.kv_gather(caches[0][0], table, lens, LENGTH),
    )


def bench_copy_pages(kernel_bench: Any, caches: Any, table: Any) -> None:
    src, dst = table.flatten()[: PAGES // 2], table.flatten()[PAGES // 2 :]
    kernel_bench(
        "kv_copy_pages",
        lambda: kv_copy_pages(*caches, src, dst),
        num_bytes=4 * LAYERS * row_bytes(PAGES // 2 * PAGE_SIZE),
        torch_fn=lambda: reference.kv_copy_pages(*caches, src, dst),
    )
