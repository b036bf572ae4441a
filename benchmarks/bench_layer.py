"""The ops of a decoder layer beside attention: few-row products, RMSNorm, gated SiLU, rotary."""

import pytest
import torch

from inferlab import kernels
from inferlab.kernels.reference import layer as reference

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# (in, out): the bundled target's gate and up, a 100 M model's, its vocabulary.
SHAPES = [(160, 896), (768, 4096), (768, 32000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def bench_linear(kernel_bench, rotate, inputs, outputs, rows, dtype):
    num_bytes = inputs * outputs * DTYPES[dtype].itemsize
    weight = rotate(lambda: torch.randn(outputs, inputs).to(DTYPES[dtype]), num_bytes)
    x = torch.randn(rows, inputs).to(DTYPES[dtype])
    kernel_bench(
        f"linear {dtype} {rows} x {inputs} -> {outputs}",
        lambda: kernels.linear(x, weight()),
        num_bytes=num_bytes,
        torch_fn=lambda: torch.nn.functional.linear(x, weight()),
    )


@pytest.mark.parametrize("rows", [1, 5, 512])
def bench_rms_norm(kernel_bench, rows):
    x, weight = torch.randn(rows, 768), torch.ones(768)
    kernel_bench(
        f"rms_norm f32 {rows} x 768",
        lambda: kernels.rms_norm(x, weight),
        num_bytes=2 * x.numel() * 4,
        torch_fn=lambda: reference.rms_norm(x, weight),
    )


@pytest.mark.parametrize("rows", [1, 5, 512])
def bench_silu_mul(kernel_bench, rows):
    x = torch.randn(rows, 2 * 2048)
    kernel_bench(
        f"silu_mul f32 {rows} x 2048",
        lambda: kernels.silu_mul(x),
        num_bytes=3 * rows * 2048 * 4,
        torch_fn=lambda: reference.silu_mul(x),
    )


@pytest.mark.parametrize("nodes", [1, 5, 512])
def bench_rope_append(kernel_bench, nodes):
    q_heads, kv_heads, dim, page_size = 12, 4, 64, 16
    q, k, v = (torch.randn(1, nodes, h, dim) for h in (q_heads, kv_heads, kv_heads))
    # The angles of a pair are equal: a rotation keeps q's length over many calls in place.
    angles = torch.randn(1, nodes, dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    pages = [torch.zeros(64, page_size, kv_heads, dim) for _ in range(2)]
    table = torch.arange(64, dtype=torch.int32)[None]
    lengths = torch.tensor([100], dtype=torch.int32)
    arguments = (q, k, v, cos, sin, *pages, table, lengths)
    kernel_bench(
        f"rope_append f32 N={nodes}",
        lambda: kernels.rope_append(*arguments),
        num_bytes=2 * nodes * (q_heads + 2 * kv_heads) * dim * 4,
        torch_fn=lambda: reference.rope_append(*arguments),
    )
