"""Trees grown to where the draft is sure of itself (EAGLE-2, Li et al., 2024).

Level by level, the ``width`` surest nodes are expanded, ``width`` children each; of all the nodes
seen, the surest ones become the tree. Everything happens on the device.

How sure: a node's token competes with its siblings by softmax of the scores they were drawn by. At
temperature 0 these are the draft's logits. Above it they include the noise that the target will add
too: what matters is not how probable a token is, but whether it wins under that noise, and the gap
between the perturbed scores says so. A path's confidence is the product along it.
"""

from __future__ import annotations

import torch

from inferlab.kernels import Frontier, TreeLinks, grow_level, grow_tree
from inferlab.specdec.tree import DraftTree


class Growth:
    """One tree per sequence on its way.

    Args:
        roots: [B] int32.
        width: nodes expanded per level, and children of each.
        levels: of children that will be added.
    """

    def __init__(self, roots: torch.Tensor, width: int, levels: int) -> None:
        self._roots = roots
        self._width = width
        self._levels = levels
        size, device = len(roots), roots.device
        expanded = 1 + width * (levels - 1)
        count = width * expanded
        self._words = expanded // 64 + 1
        self._tokens = torch.empty((size, count), dtype=torch.int32, device=device)
        self._confidence = torch.empty((size, count), device=device)
        self._expanded = torch.empty((size, expanded), dtype=torch.int32, device=device)
        self._level = 0
        self._above: torch.Tensor | None = None

    def add(self, drawn: torch.Tensor, scores: torch.Tensor) -> Frontier | None:
        """Takes the children of the last frontier, at first of the roots; returns the next
        frontier, None behind the last level.

        Args:
            drawn: [B, M, W] int32, best first, -1 where there is none.
            scores: [B, M, W] f32, what they were drawn by.
        """
        last = self._level + 1 == self._levels
        frontier = grow_level(
            drawn,
            scores,
            self._above,
            self._level,
            self._tokens,
            self._confidence,
            self._expanded,
            None if last else self._words,
        )
        self._level += 1
        self._above = None if frontier is None else frontier.ancestors
        return frontier

    def tree(self, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and parents, [B, N] int32, of the ``nodes`` surest ones, numbered in this order
        behind the root."""
        nodes = 1 + min(nodes, self._tokens.shape[1])
        return grow_tree(
            self._roots, self._tokens, self._confidence, self._expanded, self._width, nodes
        )


def grown_tree(tokens: torch.Tensor, links: TreeLinks, levels: int) -> DraftTree:
    """Trees numbered by confidence, [B, N] each, of at most ``levels`` levels."""
    size, nodes = tokens.shape
    return DraftTree(tokens, links, False, [levels] * size, [nodes] * size)
