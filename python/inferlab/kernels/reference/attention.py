"""Paged tree attention, one row at a time: which slots it sees, and a softmax over them."""

from __future__ import annotations

import torch

from inferlab.kernels.reference.kv import as_numbers, gather_slots


def slots_of_row(length: int, bits: int | None, node: int, window: int) -> list[int]:
    """The slots that a row sees.

    Args:
        length: committed tokens of its sequence.
        bits: its ancestor bits as one number; None: all nodes up to its own.
        node: its number among the sequence's nodes.
    """
    path = [j for j in range(node + 1 if bits is None else bits.bit_length())]
    if bits is not None:
        path = [j for j in path if bits >> j & 1]
    if not path:
        return []  # padding
    positions = {slot: slot for slot in range(length)}
    positions |= {length + j: length + i for i, j in enumerate(path)}
    own = length + len(path) - 1
    return [slot for slot, at in positions.items() if window == 0 or own - at < window]


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
    """The attention mask: bool [B, num_rows, num_slots], true where a row sees a cache slot."""
    visible = torch.zeros((seq_lens.shape[0], num_rows, num_slots), dtype=torch.bool)
    for b, length in enumerate(seq_lens.tolist()):
        for n in range(num_rows if num_nodes is None else int(num_nodes[b])):
            bits = None
            if ancestors is not None:
                words = ancestors[b, n].tolist()
                bits = sum((word & (2**64 - 1)) << 64 * w for w, word in enumerate(words))
            visible[b, n, slots_of_row(length, bits, node_offset + n, window)] = True
    return visible


def paged_tree_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    ancestors: torch.Tensor | None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    node_offset: int = 0,
    num_nodes: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """As `inferlab.kernels.paged_tree_attention`, computed in `compute_dtype`."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    k, v = (as_numbers(gather_slots(pages, block_table)) for pages in (k_pages, v_pages))
    visible = visible_slots(
        seq_lens,
        ancestors,
        q.shape[1],
        k.shape[1],
        window=window,
        node_offset=node_offset,
        num_nodes=num_nodes,
    )
    for b, n in visible.any(-1).nonzero().tolist():
        seen = visible[b, n]
        keys, values = (
            x[b, seen].to(compute_dtype).repeat_interleave(q.shape[2] // x.shape[2], 1)
            for x in (k, v)
        )
        scores = torch.einsum("hd,shd->hs", q[b, n].to(compute_dtype), keys) * scale
        if softcap > 0.0:
            scores = softcap * torch.tanh(scores / softcap)
        out[b, n] = torch.einsum("hs,shd->hd", torch.softmax(scores, -1), values).to(q.dtype)
    return out
