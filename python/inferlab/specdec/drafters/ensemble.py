"""Several drafters at once: their trees merged into one, what is in several of them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from inferlab.config import MAX_TREE_NODES
from inferlab.kernels import build_tree
from inferlab.models import ForwardOutput
from inferlab.models.transfer import upload
from inferlab.scheduler import Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.plan import DrafterPlan, DraftRequest, make_plan
from inferlab.specdec.reading import Reading
from inferlab.specdec.tree import Budget, DraftTree, ladder, parents_of
from inferlab.specdec.walk import Walk
from inferlab.types import check


class EnsembleDrafter(Drafter):
    """Merges the trees of its members, each drafted within a share of the budget.

    Nodes are numbered by worth: the members' best nodes first, then their second best ones, and so
    on, the first member's before the others'. A member of `keeps_nodes` hears of a walk in the
    numbers of its own tree, as far as the walk stays in it; the others hear of the merged tree.

    Args:
        drafters: the members; earlier ones get what is left over when a budget is divided.
        max_nodes: nodes of the merged tree, root included; by default what all members may draft.
    """

    name = "ensemble"

    def __init__(self, drafters: Sequence[Drafter], max_nodes: int | None = None) -> None:
        check("ensemble drafters", drafters, len(drafters) >= 1, "at least one drafter")
        most = 1 + sum(d.max_nodes - 1 for d in drafters)
        if max_nodes is not None:
            least = 1 + len(drafters)
            check(
                "ensemble max_nodes",
                max_nodes,
                least <= max_nodes <= MAX_TREE_NODES,
                f"an integer from {least}, a node for each drafter and the root, to "
                f"{MAX_TREE_NODES}",
            )
            most = min(most, max_nodes)
        self.drafters = tuple(drafters)
        self._tree_nodes = min(most, MAX_TREE_NODES)
        # A member that grows its tree draws more nodes than it keeps, and needs slots for them all.
        slots = [d.max_nodes for d in drafters if d.keeps_nodes]
        self.max_nodes = max([self._tree_nodes, *slots])
        self.max_depth = max(d.max_depth for d in drafters)
        self.hears_all = any(d.hears_all for d in drafters)
        self.feature_layers = tuple(layer for d in drafters for layer in d.feature_layers)
        self._drafted: _Drafted | None = None

    def ladder(self) -> Sequence[Budget]:
        return ladder(self._tree_nodes - 1, self.max_depth)

    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        trees = [
            d.propose(batch, Budget(min(budget.levels, d.max_depth), share))
            if share > 0
            else DraftTree.root_only(batch.roots)
            for d, share in zip(self.drafters, self._shares(budget.nodes), strict=True)
        ]
        tree, maps = merge(trees)
        self._drafted = _Drafted(tree, trees, maps)
        return tree

    def _shares(self, nodes: int) -> list[int]:
        """Each member's part of a budget: equal parts, but for what a member can not use."""
        shares = [0] * len(self.drafters)
        left = min(nodes, self._tree_nodes - 1)
        room = [d.max_nodes - 1 for d in self.drafters]
        while left > 0 and any(room):
            open_members = [i for i, r in enumerate(room) if r > 0]
            part = max(left // len(open_members), 1)
            for i in open_members:
                given = min(part, room[i], left)
                shares[i] += given
                room[i] -= given
                left -= given
        return shares

    def prefill(self, reading: Reading, output: ForwardOutput) -> None:
        for drafter, part in zip(self.drafters, self._parts(output), strict=True):
            drafter.prefill(reading, part)

    def commit(self, batch: Batch, walk: Walk) -> None:
        drafted = self._drafted
        if drafted is None or drafted.tree is not walk.tree:
            self._drafted = drafted = None  # nothing was drafted: a root, the same for all
        walks = [replace(walk, output=part, part_of=walk) for part in self._parts(walk.output)]
        own = []
        for i, drafter in enumerate(self.drafters):
            if drafted is not None and drafter.keeps_nodes:
                nodes, kept = drafted.maps[i].walk(walk.nodes, walk.kept)
                walks[i] = replace(
                    walks[i], tree=drafted.trees[i], nodes=nodes, entries=kept, kept=kept
                )
                own.append(walks[i])
        if own:
            # Queued before the host waits for the step, and there when it has.
            counts = _to_host(torch.stack([each.kept for each in own]))
            for each, on_host in zip(own, counts, strict=True):
                each.on_host = on_host
        for drafter, each in zip(self.drafters, walks, strict=True):
            drafter.commit(batch, each)

    def unread(self, batch: Batch) -> list[int]:
        return [
            max(of_row) for of_row in zip(*(d.unread(batch) for d in self.drafters), strict=True)
        ]

    def adopt(self, request: Request) -> int:
        return min(drafter.adopt(request) for drafter in self.drafters)

    def release(self, request: Request) -> None:
        for drafter in self.drafters:
            drafter.release(request)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "max_nodes": self._tree_nodes,
            "members": [d.describe() for d in self.drafters],
        }

    def _parts(self, output: ForwardOutput) -> list[ForwardOutput]:
        """The output with each member's own features."""
        if output.features is None:
            return [output] * len(self.drafters)
        sizes = [len(d.feature_layers) for d in self.drafters]
        width = output.features.shape[-1] // sum(sizes)
        slices = output.features.split([size * width for size in sizes], dim=-1)
        return [
            ForwardOutput(output.logits, part if size else None)
            for part, size in zip(slices, sizes, strict=True)
        ]


class NodeMap(NamedTuple):
    """Which node of a member's tree each node of the merged tree is.

    Attributes:
        own: [B, N] int64, -1: none.
    """

    own: torch.Tensor

    def walk(self, nodes: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A walk of the merged tree in the member's numbers, [B, S] int32, -1 from where it leaves
        the member's tree on, and how many of its kept entries stay in it, [B] int32."""
        found = self.own.gather(1, nodes.clamp_min(0).to(torch.int64))
        ahead = torch.arange(nodes.shape[1], device=nodes.device)
        inside = (found >= 0) & (ahead < kept[:, None])
        inside = inside.to(torch.int32).cumprod(1)
        own = torch.where(inside > 0, found, -1)
        return own.to(torch.int32), inside.sum(1, dtype=torch.int32)


class _Drafted(NamedTuple):
    """What the last `propose` made."""

    tree: DraftTree
    trees: list[DraftTree]
    maps: list[NodeMap]


def merge(
    trees: Sequence[DraftTree], on_host: bool | None = None
) -> tuple[DraftTree, list[NodeMap]]:
    """One tree of several with the same roots; nodes of equal paths become one.

    Args:
        trees: of the members; parents are worth more than their children.
        on_host: node by node, without padding that all rows have, or in tensor ops that ask nothing
            of the device; by default on the host for trees that are there.
    """
    if on_host is None:
        on_host = trees[0].tokens.device.type == "cpu"
    return _merge_on_host(trees) if on_host else _merge_on_device(trees)


def _merge_on_host(trees: Sequence[DraftTree]) -> tuple[DraftTree, list[NodeMap]]:
    size = len(trees[0].tokens)
    ranks = [_ranks(t) for t in trees]
    by_worth = sorted(
        (rank, i, n) for i, of_tree in enumerate(ranks) for n, rank in enumerate(of_tree)
    )
    most = 1 + sum(t.num_nodes - 1 for t in trees)
    tokens = np.zeros((size, most), dtype=np.int32)
    parents = np.full((size, most), -2, dtype=np.int32)
    own = np.full((len(trees), size, most), -1, dtype=np.int64)
    counts = []
    token_rows = [t.tokens.tolist() for t in trees]
    parent_rows = [_parents(t) for t in trees]
    for row in range(size):
        known: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        place = [[0] * t.num_nodes for t in trees]
        for _, i, n in by_worth:
            parent = parent_rows[i][row][n]
            if parent == -2:
                continue
            key = (place[i][parent] if n > 0 else -1, token_rows[i][row][n])
            node = known.get(key)
            if node is None:
                node = known[key] = len(known)
                parents[row, node], tokens[row, node] = key
            place[i][n] = node
            if own[i, row, node] < 0:
                own[i, row, node] = n
        counts.append(len(known))
    width = max(counts)
    merged = DraftTree(
        torch.from_numpy(tokens[:, :width].copy()),
        build_tree(torch.from_numpy(parents[:, :width].copy())),
        is_chain=width == 1,
        depths=_depths(trees),
        node_counts=counts,
    )
    return merged, [NodeMap(torch.from_numpy(of_tree[:, :width].copy())) for of_tree in own]


def _merge_on_device(trees: Sequence[DraftTree]) -> tuple[DraftTree, list[NodeMap]]:
    """A path has a hash, the sum over its nodes of a random word for (token, depth): nodes are
    equal if their hashes are, and a node's parent is the one with the hash that lacks the node's
    own word. Hashes of different paths that agree, once in 2^64, would cost a branch, not a token.
    """
    device = trees[0].tokens.device
    tokens = torch.cat([t.tokens for t in trees], dim=1).to(torch.int64)
    depth = torch.cat([t.links.depth for t in trees], dim=1)
    words = [_words(t) for t in trees]
    path = torch.cat(
        [(_paths(t) * w[:, None]).sum(2) for t, w in zip(trees, words, strict=True)], 1
    )
    parent_path = path - torch.cat(words, dim=1)
    worth = torch.cat([_worth(t, i, len(trees)) for i, t in enumerate(trees)], dim=1)
    count = tokens.shape[1]
    is_node = depth >= 0
    equal = (path[:, :, None] == path[:, None]) & is_node[:, None]  # [B, M, M]
    # One of equal nodes stands for all: the one that is worth most.
    never = torch.iinfo(torch.int64).max
    best = torch.where(equal, worth[:, None], never).min(2)
    stands = is_node & (best.values == worth)
    order = torch.where(stands, worth, never).sort(dim=1, stable=True).indices
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(count, device=device).expand_as(order))
    place = place.gather(1, best.indices).masked_fill(~is_node, 0)
    parent = (parent_path[:, :, None] == path[:, None]) & stands[:, None]
    parents = place.gather(1, parent.to(torch.int8).argmax(2)).masked_fill(~stands, -2)
    parents = parents.masked_fill(depth == 0, -1)

    width = 1 + sum(t.num_nodes - 1 for t in trees)  # the roots are one
    order = order[:, :width]
    kept = stands.gather(1, order)
    parents = parents.gather(1, order).masked_fill(~kept, -2)
    merged = DraftTree(
        tokens.gather(1, order).masked_fill(~kept, 0).to(torch.int32),
        build_tree(parents.to(torch.int32).contiguous()),
        is_chain=width == 1,
        depths=_depths(trees),
        node_counts=[width] * len(tokens),
    )
    maps = []
    first = 0
    for tree in trees:
        # Padding is written behind the tree, and cut off.
        at = slice(first, first + tree.num_nodes)
        where = place[:, at].masked_fill(~is_node[:, at], width)
        own = torch.full((len(tokens), width + 1), -1, dtype=torch.int64, device=device)
        own.scatter_(1, where, torch.arange(tree.num_nodes, device=device).expand_as(where))
        maps.append(NodeMap(own[:, :width]))
        first = at.stop
    return merged, maps


def _depths(trees: Sequence[DraftTree]) -> list[int]:
    return [max(of_row) for of_row in zip(*(t.depths for t in trees), strict=True)]


def _ranks(tree: DraftTree) -> Sequence[int]:
    return tree.ranks if tree.ranks is not None else range(tree.num_nodes)


def _parents(tree: DraftTree) -> list[list[int]]:
    """[B][N]: -1 at roots, -2 at padding."""
    return parents_of(*(links.tolist() for links in tree.links[:3]))


def _paths(tree: DraftTree) -> torch.Tensor:
    """[B, N, N] int64: 1 where a node is on the path to another, or that node itself."""
    nodes = torch.arange(tree.num_nodes, device=tree.tokens.device)
    return (tree.links.ancestors[:, :, nodes // 64] >> (nodes % 64)) & 1


def _words(tree: DraftTree) -> torch.Tensor:
    """[B, N] int64: 64 mixed bits of each node's token and depth; a root's are its children's
    parent's, whatever it is."""
    word = (tree.tokens.to(torch.int64) << 9 | tree.links.depth) * -0x61C8864680B583EB
    word = (word ^ (word >> 32)) * -0x4B47D0C5A1A6E2D3
    return word ^ (word >> 29)


def _worth(tree: DraftTree, member: int, members: int) -> torch.Tensor:
    """[1, N] int64: low is worth much. Roots come first; no two nodes are worth the same."""
    return _interleaved(tuple(_ranks(tree)), member, members, tree.tokens.device)


@lru_cache(maxsize=1024)
def _interleaved(
    ranks: tuple[int, ...], member: int, members: int, device: torch.device
) -> torch.Tensor:
    return upload([[rank * members + member for rank in ranks]], np.int64, device)


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy that is queued, not waited for."""
    if values.device.type == "cpu":
        return values
    pinned = values.device.type == "cuda"
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
    return host.copy_(values, non_blocking=True)


def plan(request: DraftRequest) -> DrafterPlan:
    """Several drafters, planned each as if it were alone."""
    config = request.config
    plans = []
    for mode in config.ensemble.drafters:
        own = config.model_copy(update={"draft_mode": mode})
        member = DraftRequest(own, request.target, request.policy, own.levels, request.draft)
        plans.append(make_plan(member))

    def build(pages: int) -> Drafter:
        return EnsembleDrafter([plan.build(pages) for plan in plans], 1 + config.nodes)

    models = [plan.model for plan in plans if plan.model is not None]
    return DrafterPlan(build, sum(p.bytes_per_token for p in plans), ", ".join(models) or None)
