"""Growing draft trees, in torch operations: see inferlab.kernels.growth."""

from __future__ import annotations

import torch

from inferlab import _C

NEVER: float = _C.NEVER_CONFIDENT  # log confidence of what merely fills a row


def _siblings(drawn: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log confidences of drawn siblings, [.., W] each, missing ones filled."""
    missing = drawn < 0
    own = torch.log_softmax(scores.masked_fill(missing, -torch.inf), dim=-1)
    own = torch.where(missing, NEVER, own.clamp_max(0.0))
    return torch.where(missing, drawn[..., :1], drawn).clamp_min(0), own


def _write_tree(
    roots: torch.Tensor,
    picked: torch.Tensor,
    parents: torch.Tensor,
    confidence: torch.Tensor,
    tree_tokens: torch.Tensor,
    tree_parents: torch.Tensor,
    tree_confidence: torch.Tensor,
) -> None:
    torch.cat((roots[:, None], picked), dim=1, out=tree_tokens)
    tree_parents[:, 0] = -1
    tree_parents[:, 1:] = parents
    tree_confidence[:, 0] = 0.0
    tree_confidence[:, 1:] = confidence


def grow_level(
    drawn: torch.Tensor,
    scores: torch.Tensor,
    above: torch.Tensor | None,
    level: int,
    tokens: torch.Tensor,
    confidence: torch.Tensor,
    expanded: torch.Tensor,
    next_tokens: torch.Tensor | None,
    next_parents: torch.Tensor | None,
    next_ancestors: torch.Tensor | None,
) -> None:
    """See inferlab.kernels.growth.grow_level."""
    size, parents, width = drawn.shape
    before = 0 if level == 0 else 1 + (level - 1) * width
    first, count = before * width, parents * width
    if level == 0:
        expanded[:, 0] = -1
        path = torch.zeros((size, 1), device=drawn.device)
    else:
        ids = expanded[:, before : before + parents].to(torch.int64)
        path = confidence.gather(1, ids)
    filled, own = _siblings(drawn, scores)
    here = (own + path[:, :, None]).view(size, count)
    filled = filled.view(size, count)
    tokens[:, first : first + count] = filled
    confidence[:, first : first + count] = here
    if next_tokens is None or next_parents is None or next_ancestors is None:
        return
    words = next_ancestors.shape[2]
    at = here.sort(dim=1, descending=True, stable=True).indices[:, :width]
    slots = torch.arange(1 + level * width, 1 + (level + 1) * width, device=drawn.device)
    expanded[:, 1 + level * width : 1 + (level + 1) * width] = (at + first).to(torch.int32)
    torch.div(at, width, rounding_mode="floor", out=next_parents)
    bits = torch.zeros((width, words), dtype=torch.int64, device=drawn.device)
    row = torch.arange(width, device=drawn.device)
    bits[row, slots // 64] = torch.ones_like(slots) << (slots % 64)
    if above is None:
        bits[:, 0] |= 1
        next_ancestors.copy_(bits.expand(size, -1, -1))
    else:
        path_bits = above.gather(1, next_parents[:, :, None].expand(-1, -1, words))
        torch.bitwise_or(path_bits, bits, out=next_ancestors)
    torch.gather(filled, 1, at, out=next_tokens)


def grow_offsets(
    roots: torch.Tensor,
    drawn: torch.Tensor,
    scores: torch.Tensor,
    tree_tokens: torch.Tensor,
    tree_parents: torch.Tensor,
    tree_confidence: torch.Tensor,
) -> None:
    """See inferlab.kernels.growth.grow_offsets.

    Depth by depth: of each only the ``nodes`` surest can be in the tree, and only they can have
    children there.
    """
    size, depth, width = drawn.shape
    nodes = tree_tokens.shape[1]
    filled, own = _siblings(drawn, scores)
    path = torch.zeros((size, 1), device=drawn.device)
    first = 0  # number of the first node of the depth above
    tokens, confidence, above = [], [], []
    for level in range(depth):
        here = (path[:, :, None] + own[:, level, None]).flatten(1)
        sorted_ = here.sort(dim=1, descending=True, stable=True)
        path, at = sorted_.values[:, :nodes], sorted_.indices[:, :nodes]
        tokens.append(filled[:, level].gather(1, at % width))
        confidence.append(path)
        above.append(at // width + first)
        first += 1 if level == 0 else confidence[-2].shape[1]
    sure = torch.cat(confidence, dim=1).sort(dim=1, descending=True, stable=True)
    order = sure.indices[:, : nodes - 1]
    candidates = sum(c.shape[1] for c in confidence)
    place = torch.zeros((size, 1 + candidates), dtype=torch.int64, device=order.device)
    place.scatter_(1, order + 1, torch.arange(1, nodes, device=order.device).expand(size, -1))
    parents = place.gather(1, torch.cat(above, dim=1).gather(1, order))
    picked = torch.cat(tokens, dim=1).gather(1, order)
    kept = sure.values[:, : nodes - 1]
    _write_tree(roots, picked, parents, kept, tree_tokens, tree_parents, tree_confidence)


def grow_tree(
    roots: torch.Tensor,
    tokens: torch.Tensor,
    confidence: torch.Tensor,
    expanded: torch.Tensor,
    width: int,
    tree_tokens: torch.Tensor,
    tree_parents: torch.Tensor,
    tree_confidence: torch.Tensor,
) -> None:
    """See inferlab.kernels.growth.grow_tree."""
    size, count = confidence.shape
    nodes = tree_tokens.shape[1]
    sure = confidence.sort(dim=1, descending=True, stable=True)
    order, kept = sure.indices[:, : nodes - 1], sure.values[:, : nodes - 1]
    numbers = torch.arange(1, nodes, device=order.device).expand(size, -1)
    place = torch.zeros((size, count + 1), dtype=torch.int64, device=order.device)
    place.scatter_(1, order + 1, numbers)  # entry 0: the root, whose number is 0
    parents = expanded.to(torch.int64).gather(1, order // width)
    parents = place.gather(1, parents + 1)
    picked = tokens.gather(1, order)
    _write_tree(roots, picked, parents, kept, tree_tokens, tree_parents, tree_confidence)
