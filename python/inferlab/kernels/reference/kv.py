"""The paged KV cache's ops, one slot at a time."""

from __future__ import annotations

import torch


def place_of(block_table: torch.Tensor, b: int, slot: int, page_size: int) -> tuple[int, int]:
    """Page and row of a slot of sequence b."""
    return int(block_table[b, slot // page_size]), slot % page_size


def gather_slots(pages: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """All slots of the table in order, [B, max_pages * page_size, Hkv, D]; -1 reads page 0."""
    return pages[block_table.long().clamp(min=0)].flatten(1, 2)


def as_stored(x: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Heads [.., D] as such pages hold them, [.., D] or, with a scale, [.., D + 4]."""
    if pages.dtype == torch.uint8:
        kept = torch.where(x.isfinite(), x.float().clamp(-448, 448), torch.nan)
        return kept.to(torch.float8_e4m3fn).view(torch.uint8)
    if pages.dtype != torch.int8:
        return x
    x = x.float()
    largest, codes = x.abs().amax(-1, keepdim=True), torch.tensor(127.0)
    kept = largest > 1e-30
    rounded = torch.round(x * torch.where(kept, codes / largest, 0)).to(torch.int8)
    scale = torch.where(kept, largest / codes, 0)
    scale[~x.isfinite().all(-1)] = float("nan")
    return torch.cat([rounded, scale.view(torch.int8)], dim=-1)


def as_numbers(stored: torch.Tensor) -> torch.Tensor:
    """The other way round: the numbers that were rounded, [.., D]."""
    if stored.dtype == torch.uint8:
        return stored.view(torch.float8_e4m3fn).float()
    if stored.dtype != torch.int8:
        return stored
    scale = stored[..., -4:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return stored[..., :-4].float() * scale


def kv_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    node_offset: int = 0,
    num_nodes: torch.Tensor | None = None,
) -> None:
    for b in range(k.shape[0]):
        count = k.shape[1] if num_nodes is None else int(num_nodes[b])
        for n in range(count):
            slot = int(seq_lens[b]) + node_offset + n
            page, row = place_of(block_table, b, slot, k_pages.shape[1])
            k_pages[page, row] = as_stored(k[b, n], k_pages)
            v_pages[page, row] = as_stored(v[b, n], v_pages)


def kv_compact(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    accepted_nodes: torch.Tensor,
    num_accepted: torch.Tensor,
) -> None:
    """All rows are read before any is written."""
    for cache in (k_cache, v_cache):
        before = cache.clone()
        for b in range(block_table.shape[0]):
            start = int(seq_lens[b])
            for j in range(int(num_accepted[b])):
                node = int(accepted_nodes[b, j])
                page, row = place_of(block_table, b, start + node, cache.shape[2])
                to_page, to_row = place_of(block_table, b, start + j, cache.shape[2])
                cache[:, to_page, to_row] = before[:, page, row]


def kv_gather(
    pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, max_len: int
) -> torch.Tensor:
    dense = pages.new_zeros((block_table.shape[0], max_len, *pages.shape[2:]))
    for b in range(block_table.shape[0]):
        for slot in range(int(seq_lens[b])):
            page, row = place_of(block_table, b, slot, pages.shape[1])
            dense[b, slot] = pages[page, row]
    return dense


def kv_copy_pages(
    k_cache: torch.Tensor, v_cache: torch.Tensor, src: torch.Tensor, dst: torch.Tensor
) -> None:
    for cache in (k_cache, v_cache):
        for page, to in zip(src.tolist(), dst.tolist(), strict=True):
            cache[:, to] = cache[:, page]
