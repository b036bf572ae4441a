"""build_tree: from parent links to what verification and attention need of a draft tree."""

from __future__ import annotations

from typing import NamedTuple

import torch

from inferlab.kernels import reference
from inferlab.kernels._registry import as_tensor, is_compiling, is_numpy, ops_for, register


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


def _run(parents: torch.Tensor) -> TreeLinks:
    ops = ops_for(parents)
    if ops is None:
        return TreeLinks(*reference.build_tree(parents))
    if parents.dim() != 2:
        raise ValueError(f"parents has shape {list(parents.shape)}; it must be [B, N]")
    batch, nodes = parents.shape
    # Three empty_like cost less than one tensor and its three views.
    depth, first_child, next_sibling = (
        torch.empty_like(parents),
        torch.empty_like(parents),
        torch.empty_like(parents),
    )
    bits = parents.new_empty((batch, nodes, (nodes + 63) // 64), dtype=torch.int64)
    ops.build_tree(parents, depth, first_child, next_sibling, bits)
    return TreeLinks(depth, first_child, next_sibling, bits)


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
    if is_compiling():
        return TreeLinks(*torch.ops.inferlab.build_tree(parents))
    if is_numpy(parents):
        return TreeLinks(*(t.numpy() for t in _run(as_tensor(parents))))  # type: ignore[arg-type]
    return _run(parents)


def _fake(parents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    batch, nodes = parents.shape
    link = [torch.empty_like(parents) for _ in range(3)]
    bits = parents.new_empty((batch, nodes, (nodes + 63) // 64), dtype=torch.int64)
    return (*link, bits)


register(
    "build_tree(Tensor parents) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda parents: tuple(t.clone() for t in _run(parents)),
    _fake,
)
