"""What a forward pass takes (tokens, where they sit, who sees whom) and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

FINAL_HIDDEN = -1
"""The hidden state after the final norm, which the output head sees, as a feature layer."""


class ForwardOutput(NamedTuple):
    """What a pass gives to the drafter as well.

    Attributes:
        logits: [B, N, V], or [S, 1, V] of the rows that ``scored`` names.
        features: [B, N, F], the hidden states asked for, one after the other in the last
            dimension; of all rows, scored or not. None where none were asked for.
    """

    logits: torch.Tensor
    features: torch.Tensor | None = None


@dataclass(slots=True)
class ForwardBatch:
    """One forward pass over B sequences with up to N new tokens (tree nodes) each.

    A node of depth d has position ``seq_lens[b] + d`` and is written to cache slot
    ``seq_lens[b] + node_offset + n``; with a causal chain depth and node index are the same.

    Attributes:
        tokens: [B, N] i64, token ids; any valid id at padding.
        positions: [B, N] i64, absolute positions; any valid position at padding.
        seq_lens: [B] i32, committed tokens whose K/V is in the cache.
        block_table: [B, MP] i32, page ids in order, -1 where unused.
        ancestors: [B, N, W] i64 bit words, W = ceil(nodes of the whole tree / 64): bit j of row n
            says that node j is n itself or an ancestor of it. None: a causal chain, each token
            sees all earlier ones (prefill, plain decoding).
        num_nodes: [B] i32, real nodes per sequence where rows are padded on the right; None: all N.
        node_offset: nodes of the same tree that earlier passes have already written behind
            ``seq_lens`` (a draft model growing its tree level by level).
        scored: [S] i64, which of the B * N rows logits are wanted of (see `last_rows`); None: all.
        prompt_lens: [B] i32, tokens of the text that `generate` reads in one forward, these nodes
            among them: what scales positions by length takes all of them as that long (see
            `rotary`). None: every node is read in a forward of its own, as decoding does.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    ancestors: torch.Tensor | None = None
    num_nodes: torch.Tensor | None = None
    node_offset: int = 0
    scored: torch.Tensor | None = None
    prompt_lens: torch.Tensor | None = None


def last_rows(tokens: torch.Tensor, num_nodes: torch.Tensor | None = None) -> torch.Tensor | None:
    """Each sequence's last real row, for ``ForwardBatch.scored``: [B] i64; None where N is 1."""
    size, nodes = tokens.shape
    if nodes == 1:
        return None
    starts = torch.arange(0, size * nodes, nodes, device=tokens.device)
    return starts + (nodes - 1 if num_nodes is None else num_nodes.to(torch.int64) - 1)
