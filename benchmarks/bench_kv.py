"""The KV ops: kv_append, kv_compact, kv_gather, kv_copy_pages.

Pages of 16 slots. torch: index arithmetic, gather and scatter on the same pages.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import floors
import peers
import torch_ways
from inferlab.kernels import kv_append, kv_compact, kv_copy_pages, kv_gather
from inferlab.kernels.fallback import kv as torch_ops
from inputs import PAGE_SIZE, block_table
from shapes import DTYPES, Shape, grid, shapes


def row_bytes(s: Shape) -> int:
    return s["Hkv"] * s["D"] * DTYPES[s["dtype"]].itemsize


def pools(device: Any, s: Shape, num_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V pages: [pages, ...], or [layers, pages, ...] where the shape has layers."""
    size = [num_pages, PAGE_SIZE, s["Hkv"], s["D"]]
    if "layers" in s:
        size = [s["layers"], *size]
    k = torch.ones(size, dtype=DTYPES[s["dtype"]], device=device.torch)
    return k, torch.ones_like(k)


@pytest.mark.parametrize(
    "shape",
    shapes(
        [
            {"B": 8, "N": 2048, "Hkv": 8, "D": 128, "dtype": "f32"},
            {"B": 32, "N": 64, "Hkv": 8, "D": 128, "dtype": "bf16"},
            {"B": 1, "N": 1, "Hkv": 8, "D": 128, "dtype": "f32"},
        ],
        sweep=grid(B=[1, 8, 32], N=[1, 16, 64, 512], Hkv=[8], D=[64, 128], dtype=DTYPES),
    ),
)
def bench_append(kernel_bench: Any, device: Any, shape: Shape) -> None:
    batch, nodes, dtype = shape["B"], shape["N"], DTYPES[shape["dtype"]]
    num_bytes = floors.kv_append(batch * nodes, row_bytes(shape))
    start = 37 if nodes < 1024 else 0
    table = block_table(device, batch, start + nodes, PAGE_SIZE)
    lens = torch.full((batch,), start, dtype=torch.int32, device=device.torch)

    def make() -> tuple[torch.Tensor, ...]:
        # As a projection leaves them: heads outside, nodes inside, seen as [B, N, Hkv, D].
        size = (batch, shape["Hkv"], nodes, shape["D"])
        k, v = (device.randn(*size, dtype=dtype).transpose(1, 2) for _ in range(2))
        return (k, v, *pools(device, shape, table.numel()), table, lens)

    kernel_bench(
        "kv_append",
        "",
        shape,
        lambda case: kv_append(*case),
        device.cases(make, num_bytes),
        num_bytes=num_bytes,
        bound="copy" if batch * nodes > 1 else None,
        torch_fn=lambda case: torch_ops.kv_append(*case),
        peers=lambda: peers.kv_append(
            device.torch, dtype, table, [start] * batch, nodes, PAGE_SIZE
        ),
    )


@pytest.mark.parametrize(
    "shape",
    shapes(
        [
            {"layers": 32, "B": 32, "N": 64, "S": 4, "Hkv": 8, "D": 128, "dtype": "bf16"},
            {"layers": 4, "B": 8, "N": 64, "S": 4, "Hkv": 8, "D": 128, "dtype": "f32"},
            {"layers": 4, "B": 8, "N": 256, "S": 128, "Hkv": 8, "D": 128, "dtype": "f32"},
        ],
        sweep=grid(
            layers=[32], B=[1, 8, 32], N=[64], S=[2, 4, 8], Hkv=[2, 8], D=[128], dtype=["bf16"]
        ),
    ),
)
def bench_compact(kernel_bench: Any, device: Any, shape: Shape) -> None:
    """S of N nodes are kept: the root, which lies in place, and S - 1 that move."""
    batch, nodes, steps = shape["B"], shape["N"], shape["S"]
    footprint = 2 * shape["layers"] * batch * (nodes + PAGE_SIZE) * row_bytes(shape)
    count = len(device.cases(lambda: None, footprint))
    table = block_table(device, batch, 37 + count * nodes, PAGE_SIZE)
    caches = pools(device, shape, table.numel())
    i32 = {"dtype": torch.int32, "device": device.torch}
    accepted = torch.arange(steps, **i32).mul(nodes // steps).repeat(batch, 1)
    kept = torch.full((batch,), steps, **i32)
    # Each case works on a stretch of slots of its own.
    starts = [torch.full((batch,), 37 + i * nodes, **i32) for i in range(count)]
    kernel_bench(
        "kv_compact",
        "",
        shape,
        lambda lens: kv_compact(*caches, table, lens, accepted, kept),
        starts,
        num_bytes=floors.kv_compact(shape["layers"], batch * (steps - 1), row_bytes(shape)),
        bound="copy",
        torch_fn=lambda lens: torch_ways.kv_compact(*caches, table, lens, accepted),
    )


@pytest.mark.parametrize(
    "shape",
    shapes(
        [{"B": 8, "L": 2048, "Hkv": 8, "D": 128, "dtype": "f32"}],
        sweep=grid(B=[1, 32], L=[512, 4096], Hkv=[8], D=[64, 128], dtype=["f32", "bf16"]),
    ),
)
def bench_gather(kernel_bench: Any, device: Any, shape: Shape) -> None:
    batch, length = shape["B"], shape["L"]
    num_bytes = floors.kv_gather(batch * length, row_bytes(shape))
    lens = torch.full((batch,), length, dtype=torch.int32, device=device.torch)

    def make() -> tuple[torch.Tensor, ...]:
        table = block_table(device, batch, length, PAGE_SIZE)
        pages = pools(device, shape, table.numel())[0]
        out = torch.empty(batch, length, *pages.shape[2:], dtype=pages.dtype, device=pages.device)
        return pages, table, out

    kernel_bench(
        "kv_gather",
        "",
        shape,
        lambda case: kv_gather(case[0], case[1], lens, length, out=case[2]),
        device.cases(make, num_bytes),
        num_bytes=num_bytes,
        bound="copy",
        torch_fn=lambda case: torch_ops.kv_gather(case[0], case[1], lens, case[2]),
    )


@pytest.mark.parametrize(
    "shape",
    shapes(
        [
            {"layers": 4, "pages": 512, "Hkv": 8, "D": 128, "dtype": "f32"},
            {"layers": 32, "pages": 8, "Hkv": 8, "D": 128, "dtype": "bf16"},
        ],
        sweep=grid(layers=[32], pages=[1, 16, 64], Hkv=[8], D=[64, 128], dtype=["f32", "bf16"]),
    ),
)
def bench_copy_pages(kernel_bench: Any, device: Any, shape: Shape) -> None:
    """`pages` pages to as many others, in all layers."""
    moves = shape["pages"]
    num_bytes = floors.kv_copy_pages(shape["layers"], moves, PAGE_SIZE * row_bytes(shape))
    count = len(device.cases(lambda: None, num_bytes))
    caches = pools(device, shape, 2 * moves * count)
    pages = torch.randperm(2 * moves * count, generator=device.generator, device=device.torch)
    pairs = [chunk.int().chunk(2) for chunk in pages.chunk(count)]
    kernel_bench(
        "kv_copy_pages",
        "",
        shape,
        lambda pair: kv_copy_pages(*caches, *pair),
        pairs,
        num_bytes=num_bytes,
        bound="copy",
        torch_fn=lambda pair: torch_ops.kv_copy_pages(*caches, *pair),
    )
