"""The ops of a decoder layer beside attention: few-row products, RMSNorm, gated SiLU, rotary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import floors
import peers
from inferlab import kernels
from inferlab.kernels.fallback.layer import rope_append as torch_rope_append
from inferlab.kernels.reference import layer as reference
from inputs import block_table
from shapes import DTYPES, Shape, grid, shapes

# The bundled target's gate and up; a 100 M model's, and its vocabulary; an 8 B model's gate and up,
# down, Q K V, output of the attention.
LINEAR = [
    *((160, 896), (768, 4096), (768, 32_000)),
    *((4096, 28_672), (14_336, 4096), (4096, 6144), (4096, 4096)),
]


@pytest.mark.parametrize(
    "shape",
    shapes(
        [
            {"rows": rows, "in": i, "out": o, "dtype": dtype}
            for i, o in LINEAR
            for rows, dtype in (
                *((1, "f32"), (5, "f32")),
                *((rows, "bf16") for rows in (1, 5, 16, 32)),
            )
            if i < 4096 or dtype == "bf16"
        ],
        sweep=[
            {"rows": rows, "in": i, "out": o, "dtype": dtype}
            for i, o in LINEAR
            for rows in (1, 4, 8, 16, 32, 64, 128)
            for dtype in ("f32", "bf16")
        ],
    ),
)
def bench_linear(kernel_bench: Any, device: Any, shape: Shape) -> None:
    rows, inputs, outputs, dtype = shape["rows"], shape["in"], shape["out"], DTYPES[shape["dtype"]]
    if device.name != "cpu" and (shape["dtype"] == "f32" or rows > 16):
        pytest.skip("linear is torch's own product there")
    num_bytes = floors.linear(rows, inputs, outputs, dtype.itemsize)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        x = device.randn(rows, inputs, dtype=dtype)
        return x, device.randn(outputs, inputs, dtype=dtype)

    kernel_bench(
        "linear",
        "",
        shape,
        lambda case: kernels.linear(*case, constant_weight=True),
        device.cases(make, num_bytes),
        num_bytes=num_bytes,
        bound="read",
        torch_fn=lambda case: torch.nn.functional.linear(*case),
    )


@pytest.mark.parametrize(
    "shape",
    shapes(
        [
            {"rows": rows, "in": i, "out": o, "dtype": "bf16", "bits": bits}
            for i, o in LINEAR
            for bits in (8, 4)
            for rows in (1, 16, 64)
        ],
        sweep=[
            {"rows": rows, "in": i, "out": o, "dtype": dtype, "bits": bits}
            for i, o in LINEAR
            for bits in (8, 4)
            for rows in (1, 4, 8, 16, 32, 64, 128)
            for dtype in ("f32", "bf16")
        ],
    ),
)
def bench_packed_linear(kernel_bench: Any, device: Any, shape: Shape) -> None:
    rows, inputs, outputs, dtype = shape["rows"], shape["in"], shape["out"], DTYPES[shape["dtype"]]
    if device.name != "cpu":
        pytest.skip("weights are packed on CPUs alone")
    packed = kernels.pack(torch.ones(16, inputs), shape["bits"])
    num_bytes = floors.packed_linear(rows, outputs, inputs, packed.data.numel(), dtype.itemsize)

    def make() -> tuple[torch.Tensor, kernels.PackedWeight]:
        weight = device.randn(outputs, inputs, dtype=dtype)
        return device.randn(rows, inputs, dtype=dtype), kernels.pack(weight, shape["bits"])

    kernel_bench(
        "packed_linear",
        f"{shape['bits']} bits",
        shape,
        lambda case: kernels.packed_linear(*case),
        device.cases(make, num_bytes),
        num_bytes=num_bytes,
        bound="read",
        torch_fn=None,
    )


@pytest.mark.parametrize(
    "shape",
    shapes(
        grid(rows=[1, 5, 512], dim=[768], dtype=["f32"])
        + grid(rows=[64], dim=[4096], dtype=["bf16"]),
        sweep=grid(rows=[1, 16, 64, 512], dim=[768, 4096, 8192], dtype=DTYPES),
    ),
)
def bench_rms_norm(kernel_bench: Any, device: Any, shape: Shape) -> None:
    rows, dim, dtype = shape["rows"], shape["dim"], DTYPES[shape["dtype"]]
    weight = torch.ones(dim, dtype=dtype, device=device.torch)
    num_bytes = floors.rms_norm(rows, dim, dtype.itemsize)
    kernel_bench(
        "rms_norm",
        "",
        shape,
        lambda x: kernels.rms_norm(x, weight),
        device.cases(lambda: device.randn(rows, dim, dtype=dtype), num_bytes),
        num_bytes=num_bytes,
        bound="copy" if rows >= 64 else None,
        torch_fn=lambda x: torch.nn.functional.rms_norm(x, (dim,), weight, 1e-6),
        peers=lambda: peers.rms_norm(device.torch, weight),
    )


@pytest.mark.parametrize(
    "shape",
    shapes(
        grid(rows=[1, 5, 512], dim=[2048], dtype=["f32"])
        + grid(rows=[64], dim=[14_336], dtype=["bf16"]),
        sweep=grid(rows=[1, 16, 64, 512], dim=[2048, 14_336], dtype=DTYPES),
    ),
)
def bench_silu_mul(kernel_bench: Any, device: Any, shape: Shape) -> None:
    rows, dim, dtype = shape["rows"], shape["dim"], DTYPES[shape["dtype"]]
    num_bytes = floors.silu_mul(rows, dim, dtype.itemsize)
    kernel_bench(
        "silu_mul",
        "",
        shape,
        kernels.silu_mul,
        device.cases(lambda: device.randn(rows, 2 * dim, dtype=dtype), num_bytes),
        num_bytes=num_bytes,
        bound="copy" if rows >= 64 else None,
        torch_fn=reference.silu_mul,
        peers=lambda: peers.silu_mul(device.torch, dtype),
    )


@pytest.mark.parametrize(
    "shape",
    shapes(
        grid(B=[1], N=[1, 5, 512], Hq=[12], Hkv=[4], D=[64], dtype=["f32"])
        + grid(B=[32], N=[16], Hq=[32], Hkv=[8], D=[128], dtype=["bf16"]),
        sweep=grid(B=[1, 32], N=[1, 16, 64], Hq=[32], Hkv=[8], D=[128], dtype=DTYPES),
    ),
)
def bench_rope_append(kernel_bench: Any, device: Any, shape: Shape) -> None:
    batch, nodes, dtype = shape["B"], shape["N"], DTYPES[shape["dtype"]]
    q_heads, kv_heads, dim, page_size = shape["Hq"], shape["Hkv"], shape["D"], 16
    num_bytes = floors.rope_append(batch, nodes, q_heads, kv_heads, dim, dtype.itemsize)
    table = block_table(device, batch, 100 + nodes, page_size)
    lengths = torch.full((batch,), 100, dtype=torch.int32, device=device.torch)

    def make() -> tuple[torch.Tensor, ...]:
        q, k, v = (
            device.randn(batch, nodes, h, dim, dtype=dtype) for h in (q_heads, kv_heads, kv_heads)
        )
        # The angles of a pair are equal: a rotation keeps q's length over many calls in place.
        angles = device.randn(batch, nodes, dim // 2).repeat(1, 1, 2)
        pages = [
            torch.zeros(table.numel(), page_size, kv_heads, dim, dtype=dtype, device=device.torch)
            for _ in range(2)
        ]
        return q, k, v, angles.cos().to(dtype), angles.sin().to(dtype), *pages, table, lengths

    kernel_bench(
        "rope_append",
        "",
        shape,
        lambda case: kernels.rope_append(*case),
        device.cases(make, num_bytes),
        num_bytes=num_bytes,
        bound="copy" if batch * nodes >= 64 else None,
        torch_fn=lambda case: torch_rope_append(*case),
    )
