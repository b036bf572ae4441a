"""Prompt lookup: what followed the last time the text ended like this (Saxena, 2023)."""

from __future__ import annotations

from typing import Any

import numpy as np

from inferlab.config import MAX_TREE_NODES
from inferlab.kernels import build_tree
from inferlab.models.transfer import upload
from inferlab.scheduler import Sequence
from inferlab.specdec.batch import Batch
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.tree import Budget, DraftTree, TreeShape
from inferlab.types import check


class NgramIndex:
    """Where each n-gram of a growing token list ended, newest last; O(1) work per token and n."""

    def __init__(self, min_match: int, max_match: int) -> None:
        self._sizes = range(min_match, max_match + 1)
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._done = 0

    def extend(self, tokens: list[int]) -> None:
        """Indexes the tokens that were added since the last call."""
        for end in range(self._done + 1, len(tokens) + 1):
            for n in self._sizes:
                if n <= end:
                    self._ends.setdefault(tuple(tokens[end - n : end]), []).append(end)
        self._done = len(tokens)

    def continuations(self, tokens: list[int], k: int, branches: int) -> list[list[int]]:
        """Up to ``branches`` different continuations of at most ``k`` tokens.

        Longer matches first, newer before older.
        """
        found: list[list[int]] = []
        for n in reversed(self._sizes):
            if n > len(tokens):
                continue
            ends = self._ends.get(tuple(tokens[len(tokens) - n :]), ())
            for end in reversed(ends):
                continuation = tokens[end : end + k]
                if continuation and not any(
                    other[: len(continuation)] == continuation for other in found
                ):
                    found.append(continuation)
                    if len(found) == branches:
                        return found
        return found


class NgramDrafter(Drafter):
    """Drafts from the sequence's own tokens, without a model.

    Args:
        max_depth: tokens to draft at most.
        branches: different continuations merged into one tree; 1 makes chains.
        min_match, max_match: sizes of the n-gram that must have occurred before.
    """

    name = "ngram"

    def __init__(
        self, max_depth: int = 8, branches: int = 1, min_match: int = 1, max_match: int = 4
    ) -> None:
        check("ngram min_match", min_match, min_match >= 1, "an integer >= 1")
        check("ngram max_match", max_match, max_match >= min_match, "an integer >= min_match")
        check("ngram branches", branches, branches >= 1, "an integer >= 1")
        self.max_depth = max_depth
        self.branches = branches
        self.min_match = min_match
        self.max_match = max_match
        self.max_nodes = min(1 + max_depth * branches, MAX_TREE_NODES)
        self._indexes: dict[int, NgramIndex] = {}

    def propose(self, batch: Batch, budget: Budget) -> DraftTree:
        k = min(budget.levels, self.max_depth)
        most = 1 + min(budget.nodes, self.max_nodes - 1)
        trees = [self._tree(s, k, most) for s in batch.sequences]
        width = max(len(tokens) for tokens, _ in trees)
        if width == 1:
            return DraftTree.root_only(batch.roots)
        tokens = np.zeros((len(trees), width), dtype=np.int32)
        parents = np.full((len(trees), width), -2, dtype=np.int32)
        for row, (node_tokens, node_parents) in enumerate(trees):
            tokens[row, : len(node_tokens)] = node_tokens
            parents[row, : len(node_parents)] = node_parents
        is_chain = all(p == list(range(-1, len(p) - 1)) for _, p in trees)
        if is_chain and all(len(t) == width for t, _ in trees):
            links = TreeShape.chain(width - 1).links(len(trees), batch.device)
        else:
            links = build_tree(upload(parents, np.int32, batch.device))
        return DraftTree(
            upload(tokens, np.int32, batch.device),
            links,
            is_chain,
            [_depth(p) for _, p in trees],
            [len(t) for t, _ in trees],
        )

    def _tree(self, sequence: Sequence, k: int, most: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of one sequence's tree of at most ``most`` nodes: a trie."""
        index = self._indexes.get(sequence.request_id)
        if index is None:
            index = self._indexes[sequence.request_id] = NgramIndex(self.min_match, self.max_match)
        index.extend(sequence.tokens)
        tokens, parents = [sequence.tokens[-1]], [-1]
        children: list[dict[int, int]] = [{}]
        for continuation in index.continuations(sequence.tokens, k, self.branches):
            node = 0
            for token in continuation:
                child = children[node].get(token)
                if child is None:
                    if len(tokens) == most:
                        break
                    child = len(tokens)
                    children[node][token] = child
                    children.append({})
                    tokens.append(token)
                    parents.append(node)
                node = child
        return tokens, parents

    def release(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence.request_id, None)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "branches": self.branches,
            "min_match": self.min_match,
            "max_match": self.max_match,
        }


def _depth(parents: list[int]) -> int:
    depth = [0] * len(parents)
    for node, parent in enumerate(parents):
        depth[node] = 0 if parent < 0 else depth[parent] + 1
    return max(depth)
