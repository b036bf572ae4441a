"""Trees grown to where the draft is sure of itself (EAGLE-2, Li et al., 2024).

Level by level, the ``width`` surest nodes are expanded, ``width`` children each; of all the nodes
seen, the surest ones become the tree. Everything happens on the device.

How sure: a node's token competes with its siblings by softmax of the scores they were drawn by. At
temperature 0 these are the draft's logits. Above it they include the noise that the target will add
too: what matters is not how probable a token is, but whether it wins under that noise, and the gap
between the perturbed scores says so. A path's confidence is the product along it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from inferlab.kernels import build_tree
from inferlab.specdec.tree import DraftTree

NEVER = -1e30
"""Log confidence of what merely fills a row in which too few tokens survived the filters."""


@dataclass
class Frontier:
    """The nodes to be expanded next, in slots of their own, level after level; slot 0 is the root.

    Attributes:
        tokens: [B, W] int32.
        parents: [B, W] int64: which node of the level before each one hangs on.
        confidence: [B, W] log of the product along the path.
        ids: [B, W] int64: the number of each among all candidates.
        ancestors: [B, W, words] int64: bit s: slot s holds it or an ancestor of it.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    confidence: torch.Tensor
    ids: torch.Tensor
    ancestors: torch.Tensor


class Growth:
    """One tree per sequence on its way.

    Args:
        roots: [B] int32.
        width: nodes expanded per level, and children of each.
        levels: at most.
    """

    def __init__(self, roots: torch.Tensor, width: int, levels: int) -> None:
        self._roots = roots
        self._width = width
        self._levels = levels
        slots = width * max(levels - 1, 1)
        self._bits = _slot_bits(slots, roots.device)
        self._tokens: list[torch.Tensor] = []
        self._confidence: list[torch.Tensor] = []
        self._parents: list[torch.Tensor] = []
        self._count = 0

    def add(
        self, drawn: torch.Tensor, scores: torch.Tensor, frontier: Frontier | None
    ) -> Frontier | None:
        """Takes the children of a frontier (None: of the roots); returns the next frontier, None
        behind the last level.

        Args:
            drawn: [B, M, W] int32, best first, -1 where there is none.
            scores: [B, M, W] f32, what they were drawn by.
        """
        size, parents, width = drawn.shape
        missing = drawn < 0
        confidence = torch.log_softmax(scores, dim=-1)
        confidence = torch.where(missing, NEVER, confidence)
        tokens = torch.where(missing, drawn[:, :, :1], drawn).clamp_min(0).view(size, -1)
        if frontier is None:
            ids = torch.full((size, 1), -1, dtype=torch.int64, device=drawn.device)
        else:
            ids = frontier.ids
            confidence = confidence + frontier.confidence[:, :, None]
        confidence = confidence.view(size, -1)
        self._tokens.append(tokens)
        self._confidence.append(confidence)
        self._parents.append(ids.repeat_interleave(width, dim=1))
        first, self._count = self._count, self._count + parents * width
        if len(self._tokens) == self._levels:
            return None

        if parents == 1:
            best, at = confidence, torch.arange(width, device=drawn.device).expand(size, -1)
        else:
            best, at = confidence.topk(self._width, dim=1)
        chosen = tokens.gather(1, at)
        on = at // width
        depth = len(self._tokens) - 1
        bits = self._bits[depth * self._width : depth * self._width + self._width]
        ancestors = bits.expand(size, -1, -1).contiguous()
        if frontier is not None:
            words = ancestors.shape[-1]
            ancestors = ancestors | frontier.ancestors.gather(
                1, on[:, :, None].expand(-1, -1, words)
            )
        return Frontier(chosen, on, best, at + first, ancestors)

    def tree(self, nodes: int) -> DraftTree:
        """The ``nodes`` surest ones, numbered in this order."""
        confidence = torch.cat(self._confidence, dim=1)
        size, count = confidence.shape
        nodes = min(nodes, count)
        # A child is never surer than its parent, and a stable sort keeps the parent first on ties.
        order = confidence.sort(dim=1, descending=True, stable=True).indices[:, :nodes]
        numbers = torch.arange(1, nodes + 1, device=order.device).expand(size, -1)
        place = torch.zeros((size, count + 1), dtype=torch.int64, device=order.device)
        place.scatter_(1, order + 1, numbers)  # entry 0: the root, whose number is 0
        parents = torch.cat(self._parents, dim=1).gather(1, order)
        parents = place.gather(1, parents + 1).to(torch.int32)
        tokens = torch.cat(self._tokens, dim=1).gather(1, order)
        links = build_tree(torch.nn.functional.pad(parents, (1, 0), value=-1))
        return DraftTree(
            torch.cat((self._roots[:, None], tokens), dim=1),
            links,
            False,
            [len(self._tokens)] * size,
            [nodes + 1] * size,
        )


@lru_cache(maxsize=64)
def _slot_bits(slots: int, device: torch.device) -> torch.Tensor:
    """[slots, words] int64: row s has the bits of slot s + 1 and of the root, 0."""
    words = slots // 64 + 1
    bits = torch.zeros((slots, words), dtype=torch.int64)
    at = torch.arange(1, slots + 1)
    bits[at - 1, at // 64] = torch.ones((), dtype=torch.int64) << (at % 64)
    bits[:, 0] |= 1
    return bits.to(device)
