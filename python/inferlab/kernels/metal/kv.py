"""The KV ops on Metal: arguments as `_C` takes them (csrc/bindings/bind_kv.cpp)."""

from __future__ import annotations

import torch

from inferlab.kernels.metal.checks import (
    check,
    check_batch,
    check_offset,
    check_pages,
    page_table,
)
from inferlab.kernels.metal.shaders import THREADS, Shaders


def _word(tensors: list[torch.Tensor], sizes: list[int]) -> int:
    """Bytes to move at a time: 16 where every address and every size (in elements) allows it."""
    itemsize = tensors[0].element_size()
    offsets = [t.storage_offset() for t in tensors]
    return 16 if all(n * itemsize % 16 == 0 for n in offsets + sizes) else 2


def kv_append(
    shaders: Shaders,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    node_offset: int,
    num_nodes: torch.Tensor | None,
) -> None:
    check_pages("k_pages", k_pages)
    check("v_pages", v_pages, k_pages, k_pages.shape, k_pages.dtype)
    heads, dim = k_pages.shape[2:]
    check("k", k, k_pages, (None, None, heads, dim), k_pages.dtype, contiguous=False)
    batch, nodes = k.shape[:2]
    check("v", v, k_pages, k.shape, k_pages.dtype, contiguous=False)
    check_batch(k_pages, batch, block_table, seq_lens, num_nodes)
    check_offset(node_offset)
    if k.numel() == 0:
        return
    strides = [*k.stride()[:3], *v.stride()[:3]]
    word = _word([k, v, k_pages, v_pages], [*strides, dim])
    per_word = word // k.element_size() if word == 16 else 1
    if word == 2 and k.element_size() == 4:  # a float is two of these words
        strides, dim = [2 * s for s in strides], 2 * dim
    params = [
        *page_table(k_pages, block_table),
        *(s // per_word for s in strides),
        heads,
        dim // per_word,
        node_offset,
        nodes,
        int(num_nodes is not None),
    ]
    tensors = [k, v, k_pages, v_pages, block_table, seq_lens]
    args = [*tensors, seq_lens if num_nodes is None else num_nodes, params]
    shaders.run("kv_append", args, (nodes, batch, 2), WORD=word)


def kv_compact(
    shaders: Shaders,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    accepted: torch.Tensor,
    num_accepted: torch.Tensor,
) -> None:
    check_pages("k_cache", k_cache, 5)
    check("v_cache", v_cache, k_cache, k_cache.shape, k_cache.dtype)
    batch = block_table.shape[0]
    check_batch(k_cache, batch, block_table, seq_lens)
    check("accepted_nodes", accepted, k_cache, (batch, None), torch.int32)
    check("num_accepted", num_accepted, k_cache, (batch,), torch.int32)
    if k_cache.numel() == 0 or accepted.numel() == 0:
        return
    row = k_cache.shape[3] * k_cache.shape[4]
    word = _word([k_cache, v_cache], [row])
    row_words = row * k_cache.element_size() // word
    params = [*page_table(k_cache, block_table), accepted.shape[1], row_words]
    args = [k_cache, v_cache, block_table, seq_lens, accepted, num_accepted, params]
    threads = min(64, -(-row_words // 32) * 32)
    grid = (-(-row_words // threads), batch, 2 * k_cache.shape[0])
    shaders.run("kv_compact", args, grid, threads=threads, WORD=word)


def kv_gather(
    shaders: Shaders,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
) -> None:
    check_pages("pages", pages)
    batch = block_table.shape[0]
    check_batch(pages, batch, block_table, seq_lens)
    check("out", out, pages, (batch, None, *pages.shape[2:]), pages.dtype)
    if out.numel() == 0:
        return
    row, max_len = pages.shape[2] * pages.shape[3], out.shape[1]
    word = _word([pages, out], [row])
    params = [*page_table(pages, block_table), max_len, row * pages.element_size() // word]
    args = [pages, block_table, seq_lens, out, params]
    shaders.run("kv_gather", args, (max_len, batch), threads=64, WORD=word)


def kv_copy_pages(
    shaders: Shaders,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
) -> None:
    check_pages("k_cache", k_cache, 5)
    check("v_cache", v_cache, k_cache, k_cache.shape, k_cache.dtype)
    check("src", src, k_cache, (None,), torch.int32)
    check("dst", dst, k_cache, (src.shape[0],), torch.int32)
    if k_cache.numel() == 0:
        return
    page = k_cache[0, 0].numel()
    word = _word([k_cache, v_cache], [page])
    page_words = page * k_cache.element_size() // word
    pieces = -(-page_words // (4 * THREADS))  # four words per thread
    params = [k_cache.shape[1], page_words, pieces]
    grid = (pieces, src.shape[0], 2 * k_cache.shape[0])
    shaders.run("kv_copy_pages", [k_cache, v_cache, src, dst, params], grid, WORD=word)
