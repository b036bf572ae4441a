"""Drafting into a static shape: from draws per node to the tokens of a level."""

from __future__ import annotations

from functools import lru_cache

import torch

from inferlab.specdec.tree import TreeShape


def drafted_level(drawn: torch.Tensor, shape: TreeShape, depth: int) -> torch.Tensor:
    """Tokens of the nodes below those of one level.

    Args:
        drawn: [B, M, W] int32, the best W tokens at each of the M nodes of depth ``depth``, best
            first; -1 where fewer survived the filters.
        shape: says which node takes which of them.

    Returns:
        [B, nodes at depth + 1] int32.
    """
    size = drawn.shape[0]
    if drawn.shape[-1] > 1:
        # Fewer tokens than children survive the filters: repeat the first, a harmless try.
        drawn = torch.where(drawn < 0, drawn[:, :, :1], drawn)
    flat = drawn.view(size, -1)
    index = _picks(shape, depth, drawn.device)
    if index is not None:
        flat = flat.index_select(1, index)
    return flat.clamp_min(0)  # an invalid row drafts token 0; the target decides anyway


def tree_of_offsets(roots: torch.Tensor, drawn: torch.Tensor, shape: TreeShape) -> torch.Tensor:
    """Tokens of a tree whose nodes of one depth draw from one distribution.

    Args:
        roots: [B] int32.
        drawn: [B, depth, W] int32, the best W tokens of each depth from 1 on, best first; -1 where
            fewer survived the filters.
        shape: says which of them a node takes.

    Returns:
        [B, N] int32.
    """
    if drawn.shape[-1] > 1:
        drawn = torch.where(drawn < 0, drawn[:, :, :1], drawn)
    index = _offset_picks(shape, drawn.shape[-1], drawn.device)
    tokens = drawn.view(len(roots), -1).index_select(1, index).clamp_min(0)
    return torch.cat((roots[:, None], tokens), dim=1)


@lru_cache(maxsize=1024)
def _offset_picks(shape: TreeShape, width: int, device: torch.device) -> torch.Tensor:
    """Where in [depth * W] draws the nodes below the root find their tokens."""
    nodes = range(1, shape.num_nodes)
    picks = [(shape.depths[n] - 1) * width + shape.sibling_ranks[n] for n in nodes]
    return torch.tensor(picks, device=device)


@lru_cache(maxsize=4096)
def _picks(shape: TreeShape, depth: int, device: torch.device) -> torch.Tensor | None:
    """Where in [M * W] draws the nodes below a level find their tokens; None: in order."""
    level = shape.levels[depth]
    first = 0 if depth == 0 else shape.levels[depth - 1].start
    width = shape.widths[depth]
    size = 1 if depth == 0 else len(shape.levels[depth - 1])
    picks = [(shape.parents[n] - first) * width + shape.sibling_ranks[n] for n in level]
    return None if picks == list(range(size * width)) else torch.tensor(picks, device=device)


def describe_shape(shape: TreeShape) -> dict[str, object]:
    """For reports: levels, nodes below the root, and the most children by depth."""
    return {"depth": shape.depth, "nodes": shape.num_nodes - 1, "widths": list(shape.widths)}
