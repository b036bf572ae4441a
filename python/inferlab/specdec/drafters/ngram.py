"""Prompt lookup: what followed when the text ended like this before (Saxena, 2023).

The text so far is kept as a suffix automaton, so that the longest match costs O(1) a token however
long it is (SAM-Decoding, Hu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inferlab import _C
from inferlab.config import MAX_TREE_NODES
from inferlab.kernels import build_tree
from inferlab.models.transfer import upload
from inferlab.scheduler import Request
from inferlab.specdec.acceptance import SURE, Known, kinds_of
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.corpus import load_corpus
from inferlab.specdec.drafters.plan import DrafterPlan, DraftRequest
from inferlab.specdec.tree import Budget, DraftTree, TreeShape, ladder
from inferlab.types import check

UNBOUNDED = 2**31 - 1


class NgramDrafter(Drafter):
    """Drafts from the sequence's own tokens, and from a corpus, without a model.

    The longest suffix of the text that occurred before is looked up, and what followed it there is
    drafted: what followed most often, the newest on ties. Where that reaches the end of the text it
    goes on with itself, so that a text that repeats itself is drafted to full depth. More branches
    come from other continuations of the match, then from shorter matches.

    Args:
        max_depth: tokens to draft at most.
        branches: different continuations merged into one tree; 1 makes chains.
        min_match, max_match: sizes of the suffix that must have occurred before; None: any length.
        corpus: of `load_corpus`.
        corpus_margin: a match in the corpus goes before one in the sequence's own text, which is
            closer to what comes, if it is longer by more than this.
    """

    name = "ngram"
    known = Known(by_kind=SURE, evidence=8, asks=True, looks_up=True)

    def __init__(
        self,
        max_depth: int = 8,
        branches: int = 1,
        min_match: int = 1,
        max_match: int | None = None,
        corpus: Any = None,
        corpus_margin: int = 4,
    ) -> None:
        check("ngram min_match", min_match, min_match >= 1, "an integer >= 1")
        ordered = max_match is None or max_match >= min_match
        check("ngram max_match", max_match, ordered, "an integer >= min_match, or None")
        check("ngram branches", branches, branches >= 1, "an integer >= 1")
        check("ngram corpus_margin", corpus_margin, corpus_margin >= 0, "an integer >= 0")
        self.max_depth = max_depth
        self.branches = branches
        self.min_match = min_match
        self.max_match = max_match
        self.corpus = corpus
        self.corpus_margin = corpus_margin
        self.max_nodes = min(1 + max_depth * branches, MAX_TREE_NODES)
        self._texts: dict[int, _Text] = {}

    def ladder(self) -> Sequence[Budget]:
        if self.branches == 1:
            return super().ladder()
        return ladder(self.max_nodes - 1, self.max_depth)

    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        tries = [self._trie(r, budget) for r in batch.requests]
        if judge is not None:
            kinds = [kinds_of(worth[1:]) for _, _, _, worth in tries]
            counts = judge.keep([r.request_id for r in batch.requests], kinds)
        else:
            counts = [len(tokens) - 1 for tokens, *_ in tries]
        width = 1 + max(counts)
        if width == 1:
            return DraftTree.root_only(batch.roots)
        tokens = np.zeros((len(tries), width), dtype=np.int32)
        parents = np.full((len(tries), width), -2, dtype=np.int32)
        depths = []
        for row, ((node_tokens, node_parents, depth, _), count) in enumerate(
            zip(tries, counts, strict=True)
        ):
            tokens[row, : count + 1] = node_tokens[: count + 1]
            parents[row, : count + 1] = node_parents[: count + 1]
            cut = count + 1 < len(node_tokens)
            depths.append(_depth(node_parents[: count + 1]) if cut else depth)
        is_chain = depths == counts
        if is_chain and min(counts) == width - 1:
            links = TreeShape.chain(width - 1).links(len(tries), batch.device)
        else:
            links = build_tree(upload(parents, np.int32, batch.device))
        node_counts = [1 + n for n in counts]
        tokens_there = upload(tokens, np.int32, batch.device)
        return DraftTree(tokens_there, links, is_chain, depths, node_counts)

    def _trie(
        self, request: Request, budget: Budget
    ) -> tuple[list[int], list[int], int, list[float]]:
        """Tokens and parents of one sequence's tree, numbered by worth, its depth, and how likely
        each node is by the length of its match."""
        text = self._texts.get(request.request_id)
        if text is None:
            text = self._texts[request.request_id] = _Text(self.corpus)
        text.read(request.tokens)
        trie: tuple[list[int], list[int], int, list[float]] = _C.draft_trie(
            text.automaton,
            self.corpus,
            text.cursor,
            min(budget.levels, self.max_depth),
            self.branches,
            self.min_match,
            UNBOUNDED if self.max_match is None else self.max_match,
            self.corpus_margin,
            min(budget.nodes, self.max_nodes - 1),
        )
        return trie

    def release(self, request: Request) -> None:
        self._texts.pop(request.request_id, None)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "branches": self.branches,
            "min_match": self.min_match,
            "max_match": self.max_match,
            "corpus_tokens": 0 if self.corpus is None else len(self.corpus),
        }


def _depth(parents: Sequence[int]) -> int:
    """Levels below the root."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return max(depths)


class _Text:
    """A sequence's tokens as an automaton, and where their end is in the corpus's."""

    def __init__(self, corpus: Any) -> None:
        self.automaton = _C.SuffixAutomaton()
        self.cursor = (0, 0)
        self._corpus = corpus

    def read(self, tokens: list[int]) -> None:
        """Takes the tokens that were added since the last call."""
        new = tokens[len(self.automaton) :]
        self.automaton.extend(new)
        if self._corpus is not None:
            self.cursor = self._corpus.follow(self.cursor, new)


def plan(request: DraftRequest) -> DrafterPlan:
    """Drafts from the text itself and, if there is one, a corpus."""
    config, target = request.config, request.target
    widths = config.tree if isinstance(config.tree, tuple) else None
    path = config.ngram.corpus
    corpus = None if path is None else load_corpus(path, target.tokenizer, target.vocab_size)
    return DrafterPlan(
        lambda _: NgramDrafter(
            max_depth=len(widths) if widths is not None else request.max_levels,
            branches=max(widths) if widths is not None else 1,
            min_match=config.ngram.min_match,
            max_match=config.ngram.max_match,
            corpus=corpus,
        )
    )
