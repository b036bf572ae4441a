"""Draft trees that grow where the draft is sure (EAGLE-2).

Candidates are numbered as they are seen: [0, W) hang on the root, then W * W per level. Expanded
node f (0 is the root, then W per level) has the candidates [f * W, (f + 1) * W).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from inferlab.kernels._registry import empty, run


class Frontier(NamedTuple):
    """The nodes to expand next.

    Attributes:
        tokens: i32[B, W].
        parents: i64[B, W], which of the nodes expanded last each one hangs on.
        ancestors: i64[B, W, words]; bit 0 is the root, bit f is expanded node f.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    ancestors: torch.Tensor


class GrownTree(NamedTuple):
    """The surest nodes, numbered by confidence behind the root.

    Attributes:
        tokens, parents: i32[B, nodes].
        confidence: f32[B, nodes], log of the path's, 0 at the root; next to none at what merely
            fills a row.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    confidence: torch.Tensor

    @classmethod
    def empty(cls, size: int, nodes: int, like: torch.Tensor) -> GrownTree:
        """To be filled in, where ``like`` is."""
        tokens, parents = empty((size, nodes), like), empty((size, nodes), like)
        return cls(tokens, parents, empty((size, nodes), like, torch.float32))


def grow_level(
    drawn: torch.Tensor,
    scores: torch.Tensor,
    above: torch.Tensor | None,
    level: int,
    tokens: torch.Tensor,
    confidence: torch.Tensor,
    expanded: torch.Tensor,
    words: int | None,
) -> Frontier | None:
    """Takes the children of the nodes expanded last, and picks the W surest ones to expand next.

    A child's confidence is the softmax of its score among its siblings, in logs, added to its
    parent's. Ties go to the candidate seen first, so that a parent is never behind its child.

    Args:
        drawn: i32[B, M, W], the best W tokens at each of the M nodes, best first; -1: none.
        scores: f32[B, M, W], what they were drawn by.
        above: the frontier's ancestors; None at level 0, where M is 1.
        level: 0 for the children of the root.
        tokens, confidence: i32 and f32[B, candidates], filled in.
        expanded: i32[B, 1 + W * (levels - 1)], candidate of each expanded node, filled in.
        words: words of ancestor bits per node; None on the last level.

    Returns:
        the next frontier; None on the last level.
    """
    size, _, width = drawn.shape
    frontier = None
    if words is not None:
        frontier = Frontier(
            empty((size, width), drawn),
            empty((size, width), drawn, torch.int64),
            empty((size, width, words), drawn, torch.int64),
        )
    given = frontier or (None, None, None)
    run(drawn, "grow_level", drawn, scores, above, level, tokens, confidence, expanded, *given)
    return frontier


def grow_tree(
    roots: torch.Tensor,
    tokens: torch.Tensor,
    confidence: torch.Tensor,
    expanded: torch.Tensor,
    width: int,
    nodes: int,
) -> GrownTree:
    """The surest nodes of a growth as a tree.

    Args:
        roots: i32[B].
        tokens, confidence, expanded: what `grow_level` filled in.
        nodes: root included; at most 1 + candidates.
    """
    tree = GrownTree.empty(tokens.shape[0], nodes, tokens)
    run(tokens, "grow_tree", roots, tokens, confidence, expanded, width, *tree)
    return tree


def grow_offsets(
    roots: torch.Tensor, drawn: torch.Tensor, scores: torch.Tensor, nodes: int
) -> GrownTree:
    """The surest tree of drafts that guess each depth whatever the path there (Medusa).

    A node's confidence is as in `grow_level`; all nodes of a depth have the same children.

    Args:
        roots: i32[B].
        drawn: i32[B, D, W], the best W tokens of each depth, best first; -1: none.
        scores: f32[B, D, W], what they were drawn by.
        nodes: root included; at most as many as there are paths, 1 + W + W^2 + .. + W^D.
    """
    tree = GrownTree.empty(drawn.shape[0], nodes, drawn)
    run(drawn, "grow_offsets", roots, drawn, scores, *tree)
    return tree
