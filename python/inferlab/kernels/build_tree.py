"""build_tree: from parent links to what verification and attention need of a draft tree."""

from __future__ import annotations

from typing import NamedTuple

import torch

from inferlab.kernels._registry import empty, run


class TreeLinks(NamedTuple):
    """The structure of B trees of N nodes. Padding nodes: depth and links -1, no ancestor bits.

    Attributes:
        depth: i32[B, N], 0 at the root.
        first_child: i32[B, N], lowest child index, -1: a leaf.
        next_sibling: i32[B, N], next node with the same parent, -1: none.
        ancestors: i64[B, N, ceil(N / 64)]; bit j of row n (bit j % 64 of word j / 64): node j is n
            itself or an ancestor of n.
    """

    depth: torch.Tensor
    first_child: torch.Tensor
    next_sibling: torch.Tensor
    ancestors: torch.Tensor


def build_tree(parents: torch.Tensor) -> TreeLinks:
    """Derives depths, child links and ancestor bit words from parent links.

    Args:
        parents: i32[B, N], contiguous. Node 0 is the root, parent -1; every other node's parent has
            a lower index; padding nodes have -2. NumPy in, NumPy out.

    Returns:
        TreeLinks.

    Raises:
        ValueError: a parent that is not below its node, not in the tree, or a missing root. On CUDA
            parents stay on the device: such a node, and all that hangs on it, becomes padding.
        TypeError: parents is not int32.
    """
    if parents.ndim != 2:
        raise ValueError(f"parents has shape {list(parents.shape)}; it must be [B, N]")
    batch, nodes = parents.shape
    links = TreeLinks(
        empty(parents.shape, parents),
        empty(parents.shape, parents),
        empty(parents.shape, parents),
        empty((batch, nodes, (nodes + 63) // 64), parents, torch.int64),
    )
    run(parents, "build_tree", parents, *links)
    return links
