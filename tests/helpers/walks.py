"""Walks without an engine."""

from __future__ import annotations

import torch

from inferlab.models import ForwardOutput
from inferlab.specdec.batch import Batch
from inferlab.specdec.tree import DraftTree
from inferlab.specdec.walk import Walk


def walk_of(
    batch: Batch, tree: DraftTree, nodes: torch.Tensor, kept: torch.Tensor, output: ForwardOutput
) -> Walk:
    """A step that kept ``kept`` [B] nodes of each row of ``nodes`` [B, S]; tokens are all 0."""
    return Walk(
        tree=tree,
        output=output,
        starts=[request.num_cached for request in batch.requests],
        seq_lens=batch.seq_lens,
        nodes=nodes,
        tokens=torch.zeros_like(nodes),
        entries=kept,
        kept=kept,
    )
