"""Paged tree attention in torch operations."""

from __future__ import annotations

import torch

from inferlab.kernels.fallback.kv import gather_slots


def ancestor_bits(ancestors: torch.Tensor) -> torch.Tensor:
    """Bit words [..., W] i64 -> booleans [..., 64 * W]; bit j of word w is column 64 * w + j."""
    shifts = torch.arange(64, device=ancestors.device, dtype=torch.int64)
    return ((ancestors.unsqueeze(-1) >> shifts) & 1).flatten(-2).bool()


def visible_slots(
    seq_lens: torch.Tensor,
    ancestors: torch.Tensor | None,
    num_rows: int,
    num_slots: int,
    *,
    window: int = 0,
    node_offset: int = 0,
    num_nodes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention mask: bool [B, num_rows, num_slots], true where a row sees a cache slot.

    A committed slot stands at its own position, the i-th node of a row's path at `seq_len + i`.
    """
    device = seq_lens.device
    lens = seq_lens.long()[:, None, None]
    slots = torch.arange(num_slots, device=device)[None, None, :]
    nodes = torch.arange(num_rows, device=device)[None, :, None] + node_offset
    if ancestors is None:
        query_positions = lens + nodes
        key_positions = slots
        visible = (slots <= query_positions).expand(seq_lens.shape[0], -1, -1)
    else:
        bits = ancestor_bits(ancestors)
        rank = bits.long().cumsum(-1) - 1
        depth = rank[..., -1:]
        query_positions = lens + depth
        node_of_slot = (slots - lens).clamp(0, bits.shape[-1] - 1).expand(-1, num_rows, -1)
        in_tree = (slots >= lens) & (slots - lens < bits.shape[-1])
        committed = slots < lens
        visible = committed | (in_tree & bits.gather(-1, node_of_slot))
        visible = visible & (depth >= 0)  # a row without bits is padding
        key_positions = torch.where(committed, slots, lens + rank.gather(-1, node_of_slot))
    if window > 0:
        visible = visible & (query_positions - key_positions < window)
    if num_nodes is not None:
        visible = visible & (nodes - node_offset < num_nodes.long()[:, None, None])
    return visible


def paged_tree_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    ancestors: torch.Tensor | None,
    num_nodes: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    node_offset: int = 0,
    workspace: torch.Tensor | None = None,
) -> None:
    """As `inferlab.kernels.paged_tree_attention`."""
    batch, rows, q_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    num_slots = block_table.shape[1] * k_pages.shape[1]
    visible = visible_slots(
        seq_lens,
        ancestors,
        rows,
        num_slots,
        window=window,
        node_offset=node_offset,
        num_nodes=num_nodes,
    )
    # Slots that no row sees may hold anything, NaN included: they are zeroed, not only masked.
    used = visible.any(1)[..., None, None]
    k = gather_slots(k_pages, block_table).float().masked_fill(~used, 0.0)
    v = gather_slots(v_pages, block_table).float().masked_fill(~used, 0.0)
    grouped = q.float().reshape(batch, rows, kv_heads, q_heads // kv_heads, head_dim)
    scores = torch.einsum("bnhgd,bshd->bhgns", grouped, k) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    weights = weights.masked_fill(~visible.any(-1)[:, None, None, :, None], 0.0)
    found = torch.einsum("bhgns,bshd->bnhgd", weights, v)
    out.copy_(found.reshape(batch, rows, q_heads, head_dim))
