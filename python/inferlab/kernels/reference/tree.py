"""The slow, obvious build_tree."""

from __future__ import annotations

import torch


def build_tree(
    parents: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See inferlab.kernels.build_tree; returns depth, first_child, next_sibling, ancestors."""
    batch, nodes = parents.shape
    words = (nodes + 63) // 64
    depth = torch.full((batch, nodes), -1, dtype=torch.int32)
    first_child = torch.full((batch, nodes), -1, dtype=torch.int32)
    next_sibling = torch.full((batch, nodes), -1, dtype=torch.int32)
    ancestors = torch.zeros((batch, nodes, words), dtype=torch.int64)
    for b, row in enumerate(parents.tolist()):
        path: list[int] = [0] * nodes
        last_child = [-1] * nodes
        for n, parent in enumerate(row):
            if parent == -2 and n > 0:
                continue
            if n == 0 and parent != -1:
                raise ValueError(f"parents[{b}, 0] is {parent}; the root's parent must be -1")
            if n > 0 and not 0 <= parent < n:
                raise ValueError(
                    f"parents[{b}, {n}] is {parent}; it must be in [0, {n}), or -2 for padding"
                )
            if n > 0 and row[parent] == -2:
                raise ValueError(f"parents[{b}, {n}] is {parent}, which is a padding node")
            path[n] = 1 << n
            depth[b, n] = 0
            if n > 0:
                path[n] |= path[parent]
                depth[b, n] = depth[b, parent] + 1
                if last_child[parent] < 0:
                    first_child[b, parent] = n
                else:
                    next_sibling[b, last_child[parent]] = n
                last_child[parent] = n
            for w in range(words):
                word = (path[n] >> (64 * w)) & (2**64 - 1)
                ancestors[b, n, w] = word - 2**64 if word >= 2**63 else word
    device = parents.device
    return tuple(t.to(device) for t in (depth, first_child, next_sibling, ancestors))  # type: ignore[return-value]
