"""Ragged batches without their padding: what works row by row runs on the real rows alone.

Embeddings, norms, products and MLPs take R packed rows; attention takes the batch as [B, N], with
padding. A row's bits are the same either way, as they do not depend on the other rows.
"""

from __future__ import annotations

import torch

from inferlab.models.forward import ForwardBatch


class Packing:
    """Goes between a batch's B * N rows and its R real ones.

    One `index_select` each way: on a CPU several times as fast as writing rows to where they belong
    (``index_copy_``) and as indexing by brackets.

    Args:
        rows: [R] i64, the real ones of the B * N rows.
        size, nodes: B and N.
    """

    def __init__(self, rows: torch.Tensor, size: int, nodes: int) -> None:
        self.size, self.nodes = size, nodes
        self._rows = rows
        self._places = rows.new_zeros(size * nodes)
        self._places[rows] = torch.arange(len(rows), device=rows.device)

    @classmethod
    def of(cls, batch: ForwardBatch) -> Packing | None:
        """None where all rows are to be run: without padding; on another device than a CPU, whose
        graphs are kept by shape; of a prompt, whose rows are few pieces of padding and whose
        ``scored`` and ``prompt_lens`` count in B and N."""
        counts = batch.num_nodes
        if counts is None or not counts.is_cpu:
            return None
        if batch.scored is not None or batch.prompt_lens is not None:
            return None
        size, nodes = batch.tokens.shape
        rows = (torch.arange(nodes) < counts[:, None]).flatten().nonzero().flatten()
        return cls(rows, size, nodes) if len(rows) < size * nodes else None

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, N, ..] -> [R, ..]"""
        return padded.flatten(0, 1).index_select(0, self._rows)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """[R, ..] -> [B, N, ..], a new tensor; padding repeats the first row, so is as finite."""
        rows = packed.index_select(0, self._places)
        return rows.view(self.size, self.nodes, *packed.shape[1:])
