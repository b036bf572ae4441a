"""paged_tree_attention on Metal, with the arguments of `_C` (csrc/bindings/bind_attention.cpp)."""

from __future__ import annotations

import torch

from inferlab.kernels.metal.checks import (
    check,
    check_aligned,
    check_batch,
    check_element,
    check_pages,
    page_table,
)
from inferlab.kernels.metal.shaders import SIMD_WIDTH, Shaders

ROWS = 8  # of a threadgroup (kRows)
HEAD_CHUNKS = (2, 4, 8)  # channels per lane, of which the smallest that fits is compiled


def paged_tree_attention(
    shaders: Shaders,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    ancestors: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    node_offset: int,
    num_nodes: torch.Tensor | None,
    workspace: torch.Tensor | None = None,
) -> None:
    check_pages("k_pages", k_pages)
    element = check_element("k_pages", k_pages)
    kv_heads, dim = k_pages.shape[2:]
    check("v_pages", v_pages, k_pages, k_pages.shape, k_pages.dtype)
    check("q", q, k_pages, (None, None, None, dim), k_pages.dtype, contiguous=False)
    batch, nodes, q_heads = q.shape[:3]
    check("out", out, k_pages, q.shape, k_pages.dtype)
    if dim < 8 or dim > 256 or dim % 8:
        raise ValueError(f"q has head dimension {dim}; it must be a multiple of 8 in [8, 256]")
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"q has {q_heads} heads and k_pages {kv_heads}; "
            "query heads must be a multiple of the KV heads"
        )
    check_batch(k_pages, batch, block_table, seq_lens, num_nodes)
    if window < 0 or not softcap >= 0 or node_offset < 0:
        raise ValueError(
            f"window is {window}, softcap {softcap}, node_offset {node_offset}; "
            "each must be >= 0 (0: off)"
        )
    words = 0
    if ancestors is not None:
        check("ancestors", ancestors, k_pages, (batch, nodes, None), torch.int64)
        words = ancestors.shape[2]
    if out.numel() == 0:
        return
    if k_pages.numel() == 0:
        out.zero_()
        return
    check_aligned({"k_pages": k_pages, "v_pages": v_pages})
    params = [
        *page_table(k_pages, block_table),
        *q.stride()[:3],
        nodes,
        q_heads,
        kv_heads,
        dim,
        words,
        node_offset,
        window,
        int(num_nodes is not None),
    ]
    args = [
        *(q, k_pages, v_pages, block_table, seq_lens),
        seq_lens if ancestors is None else ancestors,
        seq_lens if num_nodes is None else num_nodes,
        out,
        params,
        [float(scale), float(softcap)],
    ]
    chunks = next(c for c in HEAD_CHUNKS if dim <= SIMD_WIDTH * c)
    grid = (-(-nodes * (q_heads // kv_heads) // ROWS), kv_heads, batch)
    shaders.run("paged_tree_attention", args, grid, ELEMENT=element, HEAD_CHUNKS=chunks)


def attention_workspace_bytes(
    shaders: Shaders, q: torch.Tensor, k_pages: torch.Tensor, block_table: torch.Tensor
) -> int:
    """None: a threadgroup goes over all keys of its rows."""
    return 0
