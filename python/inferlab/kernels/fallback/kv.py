"""The paged KV cache's ops in torch operations: index arithmetic, gather and scatter."""

from __future__ import annotations

import torch


def page_and_offset(
    block_table: torch.Tensor, slots: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each slot [B, S] of a sequence lives: page ids and rows inside the page, [B, S]."""
    slots = slots.long()
    pages = block_table.long().gather(1, (slots // page_size).clamp(0, block_table.shape[1] - 1))
    return pages, slots % page_size


def gather_slots(pages: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """All slots of the table in order, [B, max_pages * page_size, Hkv, D]; -1 reads page 0."""
    return pages[block_table.long().clamp(min=0)].flatten(1, 2)


def kv_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    node_offset: int = 0,
    num_nodes: torch.Tensor | None = None,
) -> None:
    """As `inferlab.kernels.kv_append`."""
    nodes = torch.arange(k.shape[1], device=k.device)
    slots = seq_lens.long()[:, None] + node_offset + nodes[None, :]
    pages, offsets = page_and_offset(block_table, slots, k_pages.shape[1])
    if num_nodes is None:
        k_pages[pages, offsets] = k
        v_pages[pages, offsets] = v
    else:
        kept = nodes[None, :] < num_nodes.long()[:, None]
        k_pages[pages[kept], offsets[kept]] = k[kept]
        v_pages[pages[kept], offsets[kept]] = v[kept]


def kv_compact(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    accepted_nodes: torch.Tensor,
    num_accepted: torch.Tensor,
) -> None:
    """As `inferlab.kernels.kv_compact`: all rows are read before any is written."""
    steps = torch.arange(accepted_nodes.shape[1], device=k_cache.device)
    kept = steps[None, :] < num_accepted.long()[:, None]
    starts = seq_lens.long()[:, None]
    page_size = k_cache.shape[2]
    src_page, src_row = page_and_offset(block_table, starts + accepted_nodes, page_size)
    dst_page, dst_row = page_and_offset(block_table, starts + steps[None, :], page_size)
    for cache in (k_cache, v_cache):
        moved = cache[:, src_page[kept], src_row[kept]]
        cache[:, dst_page[kept], dst_row[kept]] = moved


def kv_gather(
    pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, out: torch.Tensor
) -> None:
    """As `inferlab.kernels.kv_gather`."""
    slots = torch.arange(out.shape[1], device=pages.device)[None, :].expand(
        block_table.shape[0], -1
    )
    page, offset = page_and_offset(block_table, slots, pages.shape[1])
    dense = pages[page.clamp(min=0), offset]
    behind = (slots >= seq_lens.long()[:, None])[..., None, None]
    torch.where(behind, dense.new_zeros(()), dense, out=out)


def kv_copy_pages(
    k_cache: torch.Tensor, v_cache: torch.Tensor, src: torch.Tensor, dst: torch.Tensor
) -> None:
    """As `inferlab.kernels.kv_copy_pages`."""
    k_cache[:, dst.long()] = k_cache[:, src.long()]
    v_cache[:, dst.long()] = v_cache[:, src.long()]
