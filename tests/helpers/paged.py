"""Drives a target model over a paged cache as the engine does, but slowly and obviously."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inferlab.models import ForwardBatch, TargetModel, last_rows


def ancestor_words(parents: Sequence[Sequence[int]]) -> torch.Tensor:
    """Ancestor bit words [B, N, W] i64 of trees given by parent lists (-1 root, -2 padding)."""
    nodes = len(parents[0])
    words = torch.zeros(len(parents), nodes, -(-nodes // 64), dtype=torch.int64)
    for b, row in enumerate(parents):
        for n in range(nodes):
            for j in path_to(row, n):
                bit = 1 << (j % 64)
                words[b, n, j // 64] |= bit - (1 << 64) if bit >= 1 << 63 else bit
    return words


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """Node indices from the root to `node`; empty for padding."""
    path: list[int] = []
    if parents[node] == -2:
        return path
    while node != -1:
        path.append(node)
        node = parents[node]
    return path[::-1]


class PagedRunner:
    """B sequences in one cache whose pages are dealt out in a shuffled order.

    Unused block table entries are -1, so that reading past a sequence's pages fails.

    Args:
        model: target or draft.
        batch_size: sequences.
        max_tokens: slots per sequence.
        page_size: tokens per page.
    """

    def __init__(
        self, model: TargetModel, batch_size: int = 1, max_tokens: int = 128, page_size: int = 16
    ) -> None:
        self.model = model
        per_sequence = -(-max_tokens // page_size)
        self.cache = model.new_cache(batch_size * per_sequence + 1, page_size)
        order = torch.randperm(
            batch_size * per_sequence + 1, generator=torch.Generator().manual_seed(5)
        )
        table = order[: batch_size * per_sequence].view(batch_size, per_sequence)
        self.block_table = torch.full((batch_size, per_sequence + 1), -1, dtype=torch.int32)
        self.block_table[:, :per_sequence] = table
        self.seq_lens = torch.zeros(batch_size, dtype=torch.int32)

    def chain(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        last_only: bool = False,
        commit: bool = True,
    ) -> torch.Tensor:
        """Appends tokens (ragged lists allowed) causally; returns logits."""
        counts = [len(row) for row in tokens]
        longest = max(counts)
        ids = torch.tensor([list(row) + [0] * (longest - len(row)) for row in tokens])
        depth = torch.arange(longest)[None]
        num_nodes = None if min(counts) == longest else torch.tensor(counts, dtype=torch.int32)
        logits = self.model.forward(
            ForwardBatch(
                tokens=ids,
                positions=self.seq_lens.long()[:, None] + depth,
                seq_lens=self.seq_lens,
                block_table=self.block_table,
                num_nodes=num_nodes,
                scored=last_rows(ids, num_nodes) if last_only else None,
            ),
            self.cache,
        ).logits
        if commit:
            self.seq_lens = self.seq_lens + torch.tensor(counts, dtype=torch.int32)
        return logits

    def tree(
        self,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        first: int = 0,
        last: int | None = None,
    ) -> torch.Tensor:
        """Forwards nodes [first, last) of each tree; returns their logits [B, last - first, V]."""
        words = ancestor_words(parents)
        depths = torch.tensor(
            [[max(len(path_to(row, n)) - 1, 0) for n in range(len(row))] for row in parents]
        )
        counts = [sum(p != -2 for p in row) for row in parents]
        last = len(parents[0]) if last is None else last
        padded = min(counts) < len(parents[0])
        return self.model.forward(
            ForwardBatch(
                tokens=torch.tensor(tokens)[:, first:last],
                positions=(self.seq_lens.long()[:, None] + depths)[:, first:last],
                seq_lens=self.seq_lens,
                block_table=self.block_table,
                ancestors=words[:, first:last].contiguous(),
                num_nodes=torch.tensor(counts, dtype=torch.int32) - first if padded else None,
                node_offset=first,
            ),
            self.cache,
        ).logits

    def commit(self, accepted: Sequence[Sequence[int]]) -> None:
        """Keeps the given nodes (a path from the root) of each sequence's tree."""
        longest = max(len(row) for row in accepted)
        nodes = torch.tensor(
            [list(row) + [-1] * (longest - len(row)) for row in accepted], dtype=torch.int32
        )
        count = torch.tensor([len(row) for row in accepted], dtype=torch.int32)
        self.cache.compact(self.block_table, self.seq_lens, nodes, count)
        self.seq_lens = self.seq_lens + count
