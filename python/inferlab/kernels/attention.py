"""Attention of a draft tree's nodes (or a prompt's tokens) over the paged KV cache."""

from __future__ import annotations

from typing import Any

import torch

from inferlab.kernels._registry import empty, new_workspace, ops_for, run

Array = Any  # torch.Tensor or numpy.ndarray; NumPy in, NumPy out


def paged_tree_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    seq_lens: Array,
    ancestors: Array | None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    node_offset: int = 0,
    num_nodes: Array | None = None,
    out: Array | None = None,
    workspace: torch.Tensor | None = None,
) -> Array:
    """softmax(cap(q k^T * scale)) v over the committed prefix and each node's path in the tree.

    Row n is node `node_offset + n`. It sees cache slots [0, seq_len) and slot `seq_len + j` for
    each ancestor bit j; a node's i-th ancestor stands at position `seq_len + i`. On the CPU a row's
    result depends on nothing but that row's path: the bits are the same alone, in a batch, with any
    number of threads, and when the path is committed and the node is decoded plainly. On CUDA it
    depends on nothing but the slots that the row sees: the bits are the same alone and in a batch.

    Args:
        q: [B, N, Hq, D], the pages' dtype; any strides with D contiguous. D a multiple of 8 in
            [8, 256]; Hq a multiple of Hkv.
        k_pages, v_pages: [P, page_size, Hkv, D] f32, f16 or bf16, contiguous; or of 8 bits, on the
            CPU (see `kernels.kv`).
        block_table: [B, max_pages] i32 page ids; entries behind the used slots are not read.
        seq_lens: [B] i32, committed tokens per sequence = position of the root.
        ancestors: [B, N, W] i64 bit words (`build_tree`), or None: causal, node i sees nodes <= i.
            A row without bits is padding.
        scale: multiplies q k^T.
        window: sliding window: keys at positions > position - window are seen; 0 for all.
        softcap: c > 0 replaces a score s by c * tanh(s / c) (Gemma-2); 0 for none.
        num_nodes: [B] i32, rows of each sequence that count; None for all N.
        out: [B, N, Hq, D] to write to, contiguous.
        workspace: of `attention_workspace(q, k_pages, block_table)`, to call this without an
            allocation; its contents do not matter.

    Returns:
        [B, N, Hq, D], contiguous, q's dtype; padding rows are zeros.

    Raises:
        ValueError: a shape or value does not fit, or a slot lies outside the block table or its
            pages.
        TypeError: a dtype does not fit.

    Splitting and merging of long prefixes: Dao et al., "Flash-Decoding for long-context inference",
    2023. Tree masks: Miao et al., "SpecInfer", 2023.
    """
    if out is None:
        out = empty(q.shape, q)
    run(
        q,
        "paged_tree_attention",
        q,
        k_pages,
        v_pages,
        block_table,
        seq_lens,
        ancestors,
        num_nodes,
        out,
        scale,
        window,
        softcap,
        node_offset,
        workspace,
    )
    return out


def attention_workspace(q: Array, k_pages: Array, block_table: Array) -> torch.Tensor | None:
    """Scratch memory that paged_tree_attention may use for tensors of these shapes, or None where
    it needs none: on the CPU, on Metal, and where a row of the block table can hold no more than
    256 slots.

    Its size depends on shapes, dtype and device only: on what the block table could hold, not on
    lengths. Any number of calls may use it one after another.
    """
    return new_workspace(ops_for(q).attention_workspace_bytes(q, k_pages, block_table), q)
