"""Trees grown to where the draft is sure of itself (EAGLE-2, Li et al., 2024).

Level by level, the ``width`` surest nodes are expanded, ``width`` children each; of all the nodes
seen, the surest ones become the tree. Everything happens on the device.

How sure: a node's token competes with its siblings by softmax of the scores they were drawn by. At
temperature 0 these are the draft's logits. Above it they include the noise that the target will add
too: what matters is not how probable a token is, but whether it wins under that noise, and the gap
between the perturbed scores says so. A path's confidence is the product along it.

Where the host can read the confidences without waiting for a device, a judge may be told of them,
and says how many of each sequence's nodes are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inferlab.kernels import Frontier, GrownTree, TreeLinks, build_tree, grow_level, grow_tree
from inferlab.specdec.acceptance import SURE, Known, kinds_of_logs
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
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

    def tree(self, nodes: int) -> GrownTree:
        """The ``nodes`` surest ones, and the root."""
        nodes = 1 + min(nodes, self._tokens.shape[1])
        return grow_tree(
            self._roots, self._tokens, self._confidence, self._expanded, self._width, nodes
        )


def known_of_grown(known: Known, device: torch.device) -> Known:
    """What is said of grown trees' nodes: on a CPU also how sure the draft was of each."""
    return known._replace(by_kind=SURE) if device.type == "cpu" else known


def drafted_of(grown: GrownTree, judge: Judge | None) -> Sequence[torch.Tensor]:
    """The tensors that a captured draft hands to `drafted_tree`: links too, where no judge is to
    cut the trees."""
    return grown if judge is not None else (*grown, *build_tree(grown.parents))


def drafted_tree(
    drafted: Sequence[torch.Tensor], levels: int, batch: Batch, judge: Judge | None
) -> DraftTree:
    """The trees of a batch, of at most ``levels`` levels, from what `drafted_of` gave."""
    grown = GrownTree(*drafted[:3])
    if judge is not None:
        return judged_tree(grown, levels, batch, judge)
    return grown_tree(grown, TreeLinks(*drafted[3:]), levels)


def grown_tree(grown: GrownTree, links: TreeLinks, levels: int) -> DraftTree:
    """The trees of a batch, of at most ``levels`` levels."""
    size, nodes = grown.tokens.shape
    return DraftTree(grown.tokens, links, False, [levels] * size, [nodes] * size)


def judged_tree(grown: GrownTree, levels: int, batch: Batch, judge: Judge) -> DraftTree:
    """Of each of these trees what a judge keeps; on a CPU."""
    nodes = grown.tokens.shape[1]
    kinds = kinds_of_logs(grown.confidence[:, 1:].numpy())
    counts = judge.keep([request.request_id for request in batch.requests], kinds.tolist())
    width = 1 + max(counts)
    if width == 1:
        return DraftTree.root_only(batch.roots)
    if min(counts) == nodes - 1:
        return grown_tree(grown, build_tree(grown.parents), levels)
    # Numbered by confidence: the first of them are a tree.
    parents = grown.parents[:, :width].contiguous()
    if min(counts) + 1 < width:
        padding = torch.arange(width) > torch.tensor(counts)[:, None]
        parents = parents.masked_fill(padding, -2)
    links = build_tree(parents)
    depths = links.depth.amax(dim=1).tolist()
    tokens = grown.tokens[:, :width].contiguous()
    return DraftTree(tokens, links, False, depths, [1 + n for n in counts])
