"""What a careful PyTorch user writes for trees, the KV cache and attention: a yardstick.

Vectorised, and without waiting for the device. Sampling and verification: torch_sampling.py; what
is missing here is plain torch in inferlab.kernels.reference already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from inferlab.kernels.fallback.kv import page_and_offset


def build_tree(parents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """depth, first_child, next_sibling [B, N] and ancestors [B, N, N] bool (not packed in words:
    torch has no bit packing), of trees without padding."""
    nodes = parents.shape[1]
    index = torch.arange(nodes, device=parents.device)
    child_of = parents[:, :, None] == index  # [b, n, m]: m is n's parent
    ancestors = child_of | torch.eye(nodes, dtype=torch.bool, device=parents.device)
    for _ in range(max(1, (nodes - 1).bit_length())):  # paths of length 2, 4, 8, ...
        ancestors = torch.bmm(ancestors.float(), ancestors.float()) > 0
    depth = ancestors.sum(2) - 1
    far = nodes
    first_child = torch.where(child_of, index[:, None], far).amin(1)
    later = (parents[:, :, None] == parents[:, None, :]) & (index[None, :] > index[:, None])
    next_sibling = torch.where(later, index, far).amin(2)
    return (
        depth,
        torch.where(first_child == far, -1, first_child),
        torch.where(next_sibling == far, -1, next_sibling),
        ancestors,
    )


def kv_compact(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    accepted_nodes: torch.Tensor,
) -> None:
    """All sequences keep as many nodes: gather, then scatter, all layers at once."""
    steps = torch.arange(accepted_nodes.shape[1], device=k_cache.device)
    starts, page_size = seq_lens.long()[:, None], k_cache.shape[2]
    src_page, src_row = page_and_offset(block_table, starts + accepted_nodes, page_size)
    dst_page, dst_row = page_and_offset(block_table, starts + steps, page_size)
    for cache in (k_cache, v_cache):
        cache[:, dst_page, dst_row] = cache[:, src_page, src_row]


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """q [B, N, Hq, D] over dense keys and values [B, Hkv, L + N, D]; mask [B or 1, 1, N, L + N]."""
    rows = q.transpose(1, 2)
    gqa = rows.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, enable_gqa=gqa)
