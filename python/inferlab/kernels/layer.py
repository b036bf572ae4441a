"""The ops of a decoder layer beside attention: few-row products, RMSNorm, gated SiLU, rotary.

Element types are f32, f16 or bf16; arithmetic is fp32, and intermediate results are rounded where
the unfused PyTorch layer rounds them. NumPy arrays (f32, f16) work too.
"""

from __future__ import annotations

from typing import Any

from inferlab.kernels._registry import empty, run
from inferlab.kernels.packed_weight import PackedWeight

Array = Any  # torch.Tensor or numpy.ndarray; NumPy in, NumPy out


def rms_norm(x: Array, weight: Array, eps: float = 1e-6, *, offset: float = 0.0) -> Array:
    """``(weight + offset) * x / sqrt(mean(x^2) + eps)`` over the last dimension.

    Zhang & Sennrich, "Root mean square layer normalization", 2019.

    Args:
        x: [..., dim]; rows evenly spaced, contiguous in the last dimension.
        weight: [dim], x's dtype.
        eps: >= 0.
        offset: added to the weight; Gemma counts its weights from 1, and rounds the product alone,
            where others round the normed values, too.

    Returns:
        [..., dim] like x, contiguous.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    out = empty(x.shape, x)
    run(x, "rms_norm", x, weight, out, eps, offset)
    return out


def silu_mul(x: Array) -> Array:
    """``silu(gate) * up`` of a projection that holds gate and up side by side (SwiGLU).

    Shazeer, "GLU variants improve transformer", 2020.

    Args:
        x: [..., 2 * dim], contiguous: gate, then up.

    Returns:
        [..., dim], x's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    out = empty((*x.shape[:-1], x.shape[-1] // 2), x)
    run(x, "silu_mul", x, out)
    return out


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    constant_weight: bool = False,
) -> Array:
    """``x @ weight.T (+ bias) (+ residual)`` for few rows, where reading the weight is the work.

    Each output is a chain of fp32 sums in a fixed order: a row's result is the same bits whatever
    rows are beside it and however many threads there are. Made for up to some 30 rows, in bf16 on
    processors with AMX some 100, on CUDA for up to 16 in f16 and bf16 (and ``in`` a multiple of
    32); a matrix product for more rows is better done by a BLAS. What is not the CPU's or CUDA's is
    torch's product, with no such promise.

    Args:
        x: [rows, in], contiguous in its last dimension.
        weight: [out, in], contiguous, x's dtype.
        bias: [out] or None.
        residual: [rows, out] or None, added to the rounded product.
        constant_weight: nothing that is still queued on the device writes the weight; it is then
            read before what comes first has ended (sm_90 and newer).

    Returns:
        [rows, out], x's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    out = empty((x.shape[0], weight.shape[0]), x)
    run(x, "linear", x, weight, bias, residual, out, constant_weight)
    return out


def packed_linear(
    x: Array, weight: PackedWeight, bias: Array | None = None, residual: Array | None = None
) -> Array:
    """``x @ weight.T (+ bias) (+ residual)`` with x rounded to 8 bits, each group by its largest.

    A row's result is the same bits whatever rows are beside it, however many threads there are and
    on every instruction set. A row with an input that is NaN or infinite is NaN.

    Args:
        x: [rows, in], contiguous in its last dimension.
        weight: of `pack`.
        bias: [out] or None.
        residual: [rows, out] or None, added to the rounded product.

    Returns:
        [rows, out], x's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x has shape {list(x.shape)}; the weight is packed for {weight.in_features} inputs"
        )
    out = empty((x.shape[0], weight.out_features), x)
    sizes = weight.bits, weight.group, weight.zeros, weight.order
    run(x, "packed_linear", x, weight.data, *sizes, bias, residual, out)
    return out


def rope_append(
    q: Array,
    k: Array,
    v: Array,
    cos: Array,
    sin: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    seq_lens: Array,
    *,
    node_offset: int = 0,
    num_nodes: Array | None = None,
) -> None:
    """Rotates q in place and writes rotated k, and v, to the pages: rotary embedding + kv_append.

    Su et al., "RoFormer", 2021, with channels (i, i + rotary / 2) as pairs, as GPT-NeoX and Llama
    have it; channels from ``rotary`` on are left as they are.

    Args:
        q: [B, N, Hq, D], rotated in place; contiguous in its last two dimensions.
        k, v: [B, N, Hkv, D], likewise; not changed.
        cos, sin: [B or 1, N, rotary], contiguous, q's dtype.
        k_pages, v_pages: [P, page_size, Hkv, D], contiguous, q's dtype or of 8 bits (see
            `kernels.kv`); row n of sequence b is written to slot ``seq_lens[b] + node_offset + n``.
        block_table: [B, max_pages] i32.
        seq_lens: [B] i32, committed tokens.
        node_offset: rows already behind the committed ones.
        num_nodes: [B] i32, rows of each sequence that count; None for all N.

    Raises:
        ValueError: a shape or device does not fit, or a slot lies outside the block table or its
            pages. On CUDA lengths and ids stay on the device: a token whose slot does not exist is
            not written.
        TypeError: a dtype does not fit.
    """
    where = (k_pages, v_pages, block_table, seq_lens, node_offset, num_nodes)
    run(q, "rope_append", q, k, v, cos, sin, *where)
