"""The paged KV cache: write new rows, keep the accepted ones, read back, copy pages.

Pages are `[P, page_size, Hkv, D]` (f32, f16 or bf16, page_size a power of two); a cache of all
layers is `[L, P, page_size, Hkv, D]`. On the CPU pages may hold a head's D numbers in 8 bits each:
int8 `[P, page_size, Hkv, D + 4]`, D codes and the bytes of the float32 they are multiplied with
(the head's largest magnitude / 127), or uint8 `[P, page_size, Hkv, D]`, float8 e4m3 (at most 448).
`kv_append` and `rope_append` round, `paged_tree_attention` widens, all else moves pages as they
are. `block_table[B, max_pages] i32` holds a sequence's page ids
(-1: unused); slot s of a sequence is row `s % page_size` of page `block_table[b, s // page_size]`.
Arguments are torch tensors or NumPy arrays.

Shapes, dtypes and devices are checked everywhere. Lengths, page ids and node numbers are checked on
the CPU only: on CUDA they stay on the device, and a row whose slot does not exist (outside the
block table, or on a page outside [0, P)) is neither read nor written.
"""

from __future__ import annotations

from typing import Any

from inferlab import _C
from inferlab.kernels._registry import empty, run

Array = Any  # torch.Tensor or numpy.ndarray; NumPy in, NumPy out


def advise_large_pages(pages: Array) -> bool:
    """Asks the system for 2 MiB pages below a new CPU pool, before anything is written to it.

    Attention reads a pool in the order of its block tables: in 4 KiB pages the system's own page
    tables are read nearly as often as the K/V. Changes no value. False: it has none to give.
    """
    return bool(_C.advise_large_pages(pages))


def kv_append(
    k: Array,
    v: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    seq_lens: Array,
    *,
    node_offset: int = 0,
    num_nodes: Array | None = None,
) -> None:
    """Writes row n of sequence b to slot `seq_lens[b] + node_offset + n`, in place.

    Args:
        k, v: [B, N, Hkv, D], the pages' dtype (f32, f16 or bf16 for pages of 8 bits); any strides
            with D contiguous. Of what is not finite int8 pages make the whole head NaN.
        k_pages, v_pages: [P, page_size, Hkv, D], contiguous; written.
        block_table: [B, max_pages] i32.
        seq_lens: [B] i32, committed tokens per sequence.
        node_offset: rows already behind the committed ones.
        num_nodes: [B] i32, rows of each sequence to write; None for all N.

    Raises:
        ValueError: a shape or device does not fit; on the CPU, a slot lies outside the block table
            or its pages.
        TypeError: a dtype does not fit.
    """
    run(k, "kv_append", k, v, k_pages, v_pages, block_table, seq_lens, node_offset, num_nodes)


def kv_compact(
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    seq_lens: Array,
    accepted_nodes: Array,
    num_accepted: Array,
) -> None:
    """Moves the accepted nodes' rows to the front, in place, all layers in one call.

    For j < num_accepted[b]: slot `seq_lens[b] + accepted_nodes[b, j]` -> slot `seq_lens[b] + j`.

    Args:
        k_cache, v_cache: [L, P, page_size, Hkv, D], contiguous.
        block_table: [B, max_pages] i32.
        seq_lens: [B] i32, committed tokens before this step.
        accepted_nodes: [B, S] i32, strictly increasing over the first num_accepted entries.
        num_accepted: [B] i32.

    Raises:
        ValueError: a shape or device does not fit; on the CPU, accepted nodes do not increase or a
            slot lies outside the block table or its pages. On CUDA a node below its step stays, and
            what it would have been read from may have been overwritten.
        TypeError: a dtype does not fit.
    """
    run(
        k_cache, "kv_compact", k_cache, v_cache, block_table, seq_lens, accepted_nodes, num_accepted
    )


def kv_gather(
    pages: Array, block_table: Array, seq_lens: Array, max_len: int, *, out: Array | None = None
) -> Array:
    """The first `seq_lens[b]` slots of each sequence as one dense array.

    Args:
        pages: [P, page_size, Hkv, D], K or V.
        block_table: [B, max_pages] i32.
        seq_lens: [B] i32, each at most max_len.
        max_len: rows per sequence in the result.
        out: [B, max_len, Hkv, D] to write to, contiguous.

    Returns:
        [B, max_len, Hkv, D] in the pages' dtype, zeros behind each sequence's length.

    Raises:
        ValueError: a shape or device does not fit; on the CPU, a length is above max_len or a slot
            lies outside the block table or its pages. On CUDA slots that do not exist give zeros.
        TypeError: a dtype does not fit.
    """
    if max_len < 0:
        raise ValueError(f"max_len is {max_len}; it must be >= 0")
    if out is None:
        out = empty((len(seq_lens), max_len, *pages.shape[2:]), pages)
    run(pages, "kv_gather", pages, block_table, seq_lens, out)
    return out


def kv_copy_pages(k_cache: Array, v_cache: Array, src: Array, dst: Array) -> None:
    """Copies page src[i] to page dst[i] in all layers, in place (copy on write).

    Args:
        k_cache, v_cache: [L, P, page_size, Hkv, D], contiguous.
        src, dst: [M] i32 page ids. A page may be written once, and not be another pair's source.

    Raises:
        ValueError: a shape does not fit, a page id lies outside [0, P), or pairs overlap. On CUDA
            the ids stay on the device: pairs out of range are skipped, overlap is not detected.
        TypeError: a dtype does not fit.
    """
    run(k_cache, "kv_copy_pages", k_cache, v_cache, src, dst)
