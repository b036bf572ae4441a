"""DraftTree: the draft tokens of one step, for a whole batch, whoever drafted them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from inferlab.config import MAX_TREE_NODES
from inferlab.kernels import TreeLinks, build_tree


@dataclass(frozen=True)
class TreeShape:
    """A static tree: every node at depth d has ``widths[d]`` children. A chain has widths of 1.

    Nodes are numbered level by level, the root first.
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(w < 1 for w in self.widths):
            raise ValueError(f"tree is {list(self.widths)}; every width must be >= 1")
        if self.num_nodes > MAX_TREE_NODES:
            raise ValueError(
                f"tree is {list(self.widths)}, which makes {self.num_nodes} nodes; "
                f"at most {MAX_TREE_NODES} are allowed"
            )

    @classmethod
    def chain(cls, k: int) -> TreeShape:
        return cls((1,) * k)

    @property
    def depth(self) -> int:
        return len(self.widths)

    @property
    def is_chain(self) -> bool:
        return all(w == 1 for w in self.widths)

    @property
    def level_sizes(self) -> list[int]:
        """Nodes per level, root included: [1, w0, w0*w1, ...]."""
        sizes = [1]
        for width in self.widths:
            sizes.append(sizes[-1] * width)
            if sizes[-1] > MAX_TREE_NODES:
                break
        return sizes

    @property
    def num_nodes(self) -> int:
        return sum(self.level_sizes)

    def truncated(self, depth: int) -> TreeShape:
        """The same tree cut off below ``depth`` levels."""
        return TreeShape(self.widths[:depth]) if depth < self.depth else self

    def parents(self) -> np.ndarray:
        """Parent of each node, [N] int32; the root has -1."""
        parents = [-1]
        start = 0
        for size, width in zip(self.level_sizes, self.widths, strict=False):
            parents += [start + i // width for i in range(size * width)]
            start += size
        return np.array(parents, dtype=np.int32)

    def links(self, batch_size: int, device: torch.device) -> TreeLinks:
        """The tree's links for ``batch_size`` sequences; computed once."""
        return _links(self, batch_size, device)


@lru_cache(maxsize=512)
def _links(shape: TreeShape, batch_size: int, device: torch.device) -> TreeLinks:
    parents = torch.from_numpy(np.tile(shape.parents(), (batch_size, 1)))
    links = build_tree(parents)
    return TreeLinks(*(t.to(device) for t in links))


@dataclass
class DraftTree:
    """Draft tokens of a batch.

    Attributes:
        tokens: [B, N] int32; column 0 holds the roots, the newest committed tokens.
        links: depth, first_child, next_sibling [B, N] int32 and ancestors [B, N, W] int64.
        is_chain: every node has at most one child, in order: attention may run causally.
        depths: [B] int, levels offered to each sequence (0: it only decodes plainly).
        node_counts: [B] int, nodes of each sequence, root included.
        draft_logits: [B, N, V] logits at each node that has children, or None for drafters
            without a distribution.
    """

    tokens: torch.Tensor
    links: TreeLinks
    is_chain: bool
    depths: Sequence[int]
    node_counts: Sequence[int]
    draft_logits: torch.Tensor | None = None

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    @property
    def is_ragged(self) -> bool:
        return any(n != self.num_nodes for n in self.node_counts)

    @classmethod
    def root_only(cls, roots: torch.Tensor) -> DraftTree:
        """Plain decoding: the tree of one node. ``roots``: [B] int32."""
        batch = roots.shape[0]
        links = TreeShape(()).links(batch, roots.device)
        return cls(roots[:, None], links, True, [0] * batch, [1] * batch)
