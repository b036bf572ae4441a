"""The layer ops on Metal: arguments as `_C` takes them (csrc/bindings/bind_layer.cpp)."""

from __future__ import annotations

import torch

from inferlab.kernels.metal.checks import (
    check,
    check_batch,
    check_element,
    check_offset,
    check_pages,
    page_table,
    shape_of,
)
from inferlab.kernels.metal.shaders import THREADS, Shaders


def _row_stride(name: str, t: torch.Tensor) -> int:
    """Elements between rows, where all dimensions but the last fold into one."""
    if t.dim() == 0:
        raise ValueError(f"{name} has no dimensions")
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension")
    stride, rows = 0, 1
    for size, step in reversed(list(zip(t.shape[:-1], t.stride()[:-1], strict=True))):
        if size == 1:
            continue
        if stride and step != stride * rows:
            raise ValueError(f"{name} must have evenly spaced rows (shape {shape_of(t)})")
        stride = stride or step
        rows *= size
    return stride or t.shape[-1]


def rms_norm(
    shaders: Shaders,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    offset: float,
) -> None:
    element = check_element("x", x)
    x_stride, out_stride = _row_stride("x", x), _row_stride("out", out)
    dim = x.shape[-1]
    check("weight", weight, x, (dim,), x.dtype)
    check("out", out, x, x.shape, x.dtype, contiguous=False)
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must be >= 0")
    if x.numel() == 0:
        return
    args = [x, weight, out, [dim, x_stride, out_stride], [float(eps), float(offset)]]
    shaders.run("rms_norm", args, (x.numel() // dim,), ELEMENT=element)


def silu_mul(shaders: Shaders, x: torch.Tensor, out: torch.Tensor) -> None:
    element = check_element("x", x)
    dim = x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise ValueError(
            f"x has shape {shape_of(x)}; its last dimension must be twice that of out, "
            f"{shape_of(out)}"
        )
    check("x", x, x, x.shape, x.dtype)
    check("out", out, x, (*x.shape[:-1], dim), x.dtype)
    if out.numel() == 0:
        return
    grid = (-(-dim // THREADS), out.numel() // dim)
    shaders.run("silu_mul", [x, out, [dim]], grid, ELEMENT=element)


def rope_append(
    shaders: Shaders,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    node_offset: int,
    num_nodes: torch.Tensor | None,
) -> None:
    check_pages("k_pages", k_pages)
    element = check_element("k_pages", k_pages)
    dtype = k_pages.dtype
    kv_heads, dim = k_pages.shape[2:]
    check("v_pages", v_pages, k_pages, k_pages.shape, dtype)
    check("q", q, k_pages, (None, None, None, dim), dtype, contiguous=False)
    batch, nodes, q_heads = q.shape[:3]
    for name, t in {"k": k, "v": v}.items():
        check(name, t, k_pages, (batch, nodes, kv_heads, dim), dtype, contiguous=False)
    for name, t in {"q": q, "k": k, "v": v}.items():
        if t.shape[2] > 1 and t.stride(2) != dim:
            raise ValueError(f"{name} must be contiguous in its last two dimensions")
    check("cos", cos, k_pages, (None, nodes, None), dtype)
    check("sin", sin, k_pages, cos.shape, dtype)
    rotary = cos.shape[2]
    if cos.shape[0] not in (1, batch):
        raise ValueError(
            f"cos has shape {shape_of(cos)}; it must be [{batch} or 1, {nodes}, rotary]"
        )
    if rotary % 2 or rotary > dim:
        raise ValueError(
            f"cos has {rotary} channels; it must be even and at most the head dimension, {dim}"
        )
    check_batch(k_pages, batch, block_table, seq_lens, num_nodes)
    check_offset(node_offset)
    if k_pages.numel() == 0:
        return
    params = [
        *page_table(k_pages, block_table),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        0 if cos.shape[0] == 1 else nodes * rotary,
        q_heads,
        kv_heads,
        dim,
        rotary,
        node_offset,
        nodes,
        int(num_nodes is not None),
    ]
    if rotary == 0:  # an empty tensor has no memory to bind
        cos = sin = k
    tensors = [q, k, v, cos, sin, k_pages, v_pages, block_table, seq_lens]
    args = [*tensors, seq_lens if num_nodes is None else num_nodes, params]
    shaders.run("rope_append", args, (nodes, batch), ELEMENT=element)
