"""Draft trees: their static shapes, how much of one to draft, and the tokens of one step."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from inferlab.config import MAX_TREE_NODES
from inferlab.kernels import TreeLinks, build_tree
from inferlab.models.transfer import upload

# P(a node's r-th best draft token is the target's) where nothing was measured: what decides which
# nodes of a tree are worth most. Only the order matters, and it is much the same everywhere.
ASSUMED_ACCEPTANCE = (0.65, 0.14, 0.07, 0.04, 0.025, 0.018, 0.013, 0.01)


class Budget(NamedTuple):
    """How much to draft for each sequence: so many levels, and nodes below the root, at most."""

    levels: int
    nodes: int


NO_DRAFT = Budget(0, 0)


@dataclass(frozen=True)
class TreeShape:
    """A static tree. Nodes are numbered level by level, the root first.

    Attributes:
        parents: parent of each node, the root's is -1.
        ranks: place of each node in the order of worth, the root first. A parent comes before its
            children, so that the first n of them are a tree for every n: the family that
            ``within`` cuts its trees from. A tree cut by nodes keeps the ranks of its family; one
            cut by levels begins a family of its own.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...] = field(compare=False)

    def __post_init__(self) -> None:
        if len(self.parents) > MAX_TREE_NODES:
            raise ValueError(
                f"tree has {len(self.parents)} nodes; at most {MAX_TREE_NODES} are allowed, the "
                f"root included"
            )

    @classmethod
    def chain(cls, k: int) -> TreeShape:
        """``k`` nodes below the root, each the only child of the one before."""
        return cls(tuple(range(-1, k)), tuple(range(k + 1)))

    @classmethod
    def regular(cls, widths: Sequence[int]) -> TreeShape:
        """Every node at depth d has ``widths[d]`` children. [1, 1, 1] is a chain."""
        if any(w < 1 for w in widths):
            raise ValueError(f"tree is {list(widths)}; every width must be >= 1")
        parents = [-1]
        level = range(1)
        for width in widths:
            if len(parents) + len(level) * width > MAX_TREE_NODES:
                raise ValueError(
                    f"tree is {list(widths)}, which makes more than the {MAX_TREE_NODES} nodes "
                    f"allowed, the root included"
                )
            parents += [parent for parent in level for _ in range(width)]
            level = range(len(parents) - len(level) * width, len(parents))
        return cls._ranked(parents)

    @classmethod
    def best(
        cls, acceptance: Sequence[Sequence[float]], nodes: int, depth: int | None = None
    ) -> TreeShape:
        """The tree with the most accepted tokens to be expected from that many nodes.

        A node is reached with the product of the acceptances along its path, so the tree's expected
        accepted tokens are the sum of these products. A child's product is below its parent's: the
        ``nodes`` largest ones are a tree, and no other tree of that size has a larger sum. (With
        acceptances that do not depend on the depth this is what Sequoia's dynamic programme finds,
        Chen et al., 2024; Medusa grows its trees in the same way.)

        Args:
            acceptance: by depth, then by rank among the siblings; the last depth's stands for all
                deeper ones.
            nodes: below the root, at most.
            depth: levels, at most.
        """
        depth = depth if depth is not None else nodes
        parents, depths, values = [-1], [0], [1.0]
        ranks_among: list[int] = [0]
        candidates: list[tuple[float, int, int]] = []  # (-value, parent, rank), best first

        def offer(parent: int, rank: int) -> None:
            by_rank = acceptance[min(depths[parent], len(acceptance) - 1)]
            if depths[parent] < depth and rank < len(by_rank) and by_rank[rank] > 0:
                heapq.heappush(candidates, (-values[parent] * by_rank[rank], parent, rank))

        offer(0, 0)
        while candidates and len(parents) <= min(nodes, MAX_TREE_NODES - 1):
            value, parent, rank = heapq.heappop(candidates)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            values.append(-value)
            ranks_among.append(rank)
            offer(parent, rank + 1)
            offer(len(parents) - 1, 0)
        # Numbered by worth so far; level by level from here on.
        order = sorted(range(len(parents)), key=lambda n: (depths[n], n))
        place = {node: index for index, node in enumerate(order)}
        # Siblings must stay in the order of their ranks; by worth they are.
        return cls(tuple(place.get(parents[n], -1) for n in order), tuple(order))

    @classmethod
    def _ranked(cls, parents: Sequence[int]) -> TreeShape:
        """With the order of worth that ASSUMED_ACCEPTANCE gives."""
        values = [1.0]
        for node in range(1, len(parents)):
            rank = node - parents.index(parents[node])
            chance = ASSUMED_ACCEPTANCE[min(rank, len(ASSUMED_ACCEPTANCE) - 1)]
            values.append(values[parents[node]] * chance)
        order = sorted(range(len(parents)), key=lambda n: (-values[n], n))
        ranks = [0] * len(parents)
        for rank, node in enumerate(order):
            ranks[node] = rank
        return cls(tuple(parents), tuple(ranks))

    @property
    def num_nodes(self) -> int:
        """With the root."""
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node, 0 at the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return self.depths[-1]

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node but the last has one child; a root alone is a chain, too."""
        return self.parents == tuple(range(-1, self.num_nodes - 1))

    @cached_property
    def levels(self) -> tuple[range, ...]:
        """Nodes of each level below the root."""
        starts = [self.depths.index(d) for d in range(1, self.depth + 1)]
        return tuple(
            range(start, end)
            for start, end in zip(starts, [*starts[1:], self.num_nodes], strict=False)
        )

    @cached_property
    def sibling_ranks(self) -> tuple[int, ...]:
        """Which child of its parent each node is, 0 the first; 0 at the root."""
        seen: dict[int, int] = {}
        ranks = []
        for parent in self.parents:
            ranks.append(seen.get(parent, 0))
            seen[parent] = ranks[-1] + 1
        return tuple(ranks)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Most children of one node, by its depth."""
        return tuple(max(self.sibling_ranks[n] for n in level) + 1 for level in self.levels)

    def within(self, budget: Budget) -> TreeShape:
        """The part of the tree that a budget allows: its best nodes of the first levels."""
        if budget.levels >= self.depth and budget.nodes >= self.num_nodes - 1:
            return self
        return _within(self, self.ranks, budget)

    def ladder(self, max_levels: int) -> tuple[Budget, ...]:
        """Budgets of growing size to choose from: of a chain all, of a tree every small one, then
        about a quarter more."""
        if self.is_chain:
            return tuple(Budget(k, k) for k in range(1, min(self.depth, max_levels) + 1))
        return ladder(self.within(Budget(max_levels, MAX_TREE_NODES)).num_nodes - 1, max_levels)

    def chances(self, acceptance: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """Of the nodes below the root, by rank: the chance that the walk goes through each, with
        acceptances as for `best`."""
        chances = [1.0]
        for node in range(1, self.num_nodes):
            parent = self.parents[node]
            by_rank = acceptance[min(self.depths[parent], len(acceptance) - 1)]
            rank = self.sibling_ranks[node]
            chances.append(chances[parent] * (by_rank[rank] if rank < len(by_rank) else 0.0))
        by_worth = sorted(zip(self.ranks, chances, strict=True))
        return tuple(chance for _, chance in by_worth[1:])

    def links(self, batch_size: int, device: torch.device) -> TreeLinks:
        """The tree's links for ``batch_size`` sequences; computed once."""
        return _links(self, batch_size, device)


def ladder(nodes: int, levels: int) -> tuple[Budget, ...]:
    """Budgets of growing numbers of nodes up to ``nodes``, the smallest one node."""
    sizes: list[int] = []
    size = 1
    while size < nodes:
        sizes.append(size)
        size += max(1, size // 3)
    # As many nodes are at most as many levels; a drafter that goes level by level stops there.
    return tuple(Budget(min(levels, n), n) for n in (*sizes, nodes)) if nodes > 0 else ()


def are_chains(ladder: Sequence[Budget]) -> bool:
    """Whether all that is drafted by these budgets is chains."""
    return all(budget.levels == budget.nodes for budget in ladder)


@lru_cache(maxsize=1024)
def _within(shape: TreeShape, ranks: tuple[int, ...], budget: Budget) -> TreeShape:
    allowed = [n for n in range(shape.num_nodes) if shape.depths[n] <= budget.levels]
    by_worth = sorted(allowed, key=ranks.__getitem__)
    rank = {node: index for index, node in enumerate(by_worth)}
    kept = sorted(by_worth[: 1 + budget.nodes])
    place = {node: index for index, node in enumerate(kept)}
    parents = tuple(place.get(shape.parents[n], -1) for n in kept)
    return TreeShape(parents, tuple(rank[n] for n in kept))


@lru_cache(maxsize=512)
def _links(shape: TreeShape, batch_size: int, device: torch.device) -> TreeLinks:
    parents = np.tile(np.array(shape.parents, dtype=np.int32), (batch_size, 1))
    links = build_tree(torch.from_numpy(parents))
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
        ranks: place of each node in the order of worth; None: as they are numbered.
        left_out: of each sequence, parent and token of the best draft node that is not verified:
            what was drafted beyond it is forgotten. Parent -1: all is verified. Empty: of all.
    """

    tokens: torch.Tensor
    links: TreeLinks
    is_chain: bool
    depths: Sequence[int]
    node_counts: Sequence[int]
    draft_logits: torch.Tensor | None = None
    ranks: Sequence[int] | None = None
    left_out: Sequence[tuple[int, int]] = ()

    @property
    def num_nodes(self) -> int:
        """N: of the largest tree of the batch, root included."""
        return self.tokens.shape[1]

    @property
    def is_ragged(self) -> bool:
        """Whether some sequence has fewer nodes than N, and padding behind them."""
        return any(n != self.num_nodes for n in self.node_counts)

    def ranks_of(self, nodes: Sequence[int]) -> list[int]:
        """Ranks of the nodes of a walk, the root left out."""
        return list(nodes[1:]) if self.ranks is None else [self.ranks[n] for n in nodes[1:]]

    def capped(self, levels: Sequence[int | None]) -> DraftTree:
        """Of chains, each with so many levels at most (None: all that it has). Of other trees all
        levels stay that the deepest may have; the others' walks end where theirs do not go on."""
        allowed = [
            depth if most is None else min(depth, most)
            for depth, most in zip(self.depths, levels, strict=True)
        ]
        if not self.is_chain or allowed == list(self.depths):
            return self
        return DraftTree.chains(self.tokens, allowed, self.draft_logits)

    def cut(self, counts: Sequence[int]) -> bool:
        """Keeps the first ``counts`` nodes of each sequence, [B], a parent being before its
        children; whether these are fewer. On a CPU; in place, as a drafter knows its tree again."""
        if list(counts) == list(self.node_counts):
            return False
        width = max(counts)
        ends = upload(counts, np.int32, self.tokens.device)[:, None]
        gone = torch.arange(width) >= ends
        depth, first, following = (of[:, :width] for of in self.links[:3])
        ancestors = self.links.ancestors[:, :width, : -(-width // 64)]
        self.links = TreeLinks(
            depth.masked_fill(gone, -1),
            first.masked_fill(gone | (first >= ends), -1),
            following.masked_fill(gone | (following >= ends), -1),
            ancestors.masked_fill(gone[:, :, None], 0),
        )
        self.tokens = self.tokens[:, :width].contiguous()
        if self.draft_logits is not None:
            self.draft_logits = self.draft_logits[:, :width]
        deepest = self.links.depth.amax(1).tolist()
        self.depths = [min(pair) for pair in zip(self.depths, deepest, strict=True)]
        self.node_counts = list(counts)
        self.is_chain = self.is_chain or width == 1
        return True

    @classmethod
    def of_shape(
        cls, shape: TreeShape, tokens: torch.Tensor, draft_logits: torch.Tensor | None = None
    ) -> DraftTree:
        """Tokens [B, N] in a static shape, the same for all sequences."""
        size = tokens.shape[0]
        return cls(
            tokens,
            shape.links(size, tokens.device),
            shape.is_chain,
            [shape.depth] * size,
            [shape.num_nodes] * size,
            draft_logits,
            None if shape.is_chain else shape.ranks,
        )

    @classmethod
    def chains(
        cls,
        tokens: torch.Tensor,
        counts: Sequence[int],
        draft_logits: torch.Tensor | None = None,
    ) -> DraftTree:
        """Chains of different lengths.

        Args:
            tokens: [B, N] int32, the roots first.
            counts: [B] int, how many tokens behind the root each sequence keeps.
            draft_logits: [B, N, V] or None.
        """
        longest = max(counts)
        left_out = _left_out(tokens, counts)
        tokens = tokens[:, : longest + 1].contiguous()
        if draft_logits is not None:
            draft_logits = draft_logits[:, : longest + 1]
        if min(counts) == longest:
            chain = cls.of_shape(TreeShape.chain(longest), tokens, draft_logits)
            chain.left_out = left_out
            return chain
        parents = np.tile(np.arange(-1, longest, dtype=np.int32), (len(counts), 1))
        parents[np.arange(longest + 1) > np.array(counts)[:, None]] = -2
        links = build_tree(upload(parents, np.int32, tokens.device))
        lengths = list(counts)
        counts_with_root = [1 + n for n in lengths]
        return cls(tokens, links, True, lengths, counts_with_root, draft_logits, left_out=left_out)

    @classmethod
    def root_only(cls, roots: torch.Tensor, left_out: Sequence[tuple[int, int]] = ()) -> DraftTree:
        """Plain decoding: the tree of one node. ``roots``: [B] int32."""
        tree = cls.of_shape(TreeShape.chain(0), roots[:, None])
        tree.left_out = left_out
        return tree


def parents_of(
    depths: Sequence[Sequence[int]],
    first_children: Sequence[Sequence[int]],
    next_siblings: Sequence[Sequence[int]],
) -> list[list[int]]:
    """From links on the host, [B][N]: each node's parent, -1 at roots, -2 at padding."""
    rows = []
    for depth, first, following in zip(depths, first_children, next_siblings, strict=True):
        parents = [-1 if level == 0 else -2 for level in depth]
        for n, child in enumerate(first):
            while child >= 0:
                parents[child] = n
                child = following[child]
        rows.append(parents)
    return rows


def _left_out(tokens: torch.Tensor, counts: Sequence[int]) -> list[tuple[int, int]]:
    """Of chains of which so many tokens behind the root are verified; on a CPU."""
    last = tokens.shape[1] - 1
    if min(counts) == last:
        return []
    rows = tokens.tolist()
    return [
        (count, row[count + 1]) if count < last else (-1, 0)
        for count, row in zip(counts, rows, strict=True)
    ]
