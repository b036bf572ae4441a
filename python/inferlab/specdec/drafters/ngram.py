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
from inferlab.specdec.acceptance import SURE, Known
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.corpus import load_corpus
from inferlab.specdec.drafters.plan import DrafterPlan, DraftRequest
from inferlab.specdec.tree import Budget, DraftTree, TreeShape, ladder
from inferlab.types import check

UNBOUNDED = 2**31 - 1


class NgramDrafter(Drafter):
    """Drafts from the sequence's own tokens, what was predicted of it, and a corpus, without a
    model.

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
        longest = UNBOUNDED if max_match is None else max_match
        self._lookup = _C.PromptLookup(corpus, branches, min_match, longest, corpus_margin)

    def ladder(self) -> Sequence[Budget]:
        if self.branches == 1:
            return super().ladder()
        return ladder(self.max_nodes - 1, self.max_depth)

    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        tokens, parents, is_chain, depths, node_counts, left_out = self._lookup.draft(
            [r.request_id for r in batch.requests],
            [r.predicted + r.tokens if r.predicted else r.tokens for r in batch.requests],
            min(budget.levels, self.max_depth),
            min(budget.nodes, self.max_nodes - 1),
            judge,
        )
        width = tokens.shape[1]
        if width == 1:
            return DraftTree.root_only(batch.roots, left_out)
        if is_chain and min(node_counts) == width:
            links = TreeShape.chain(width - 1).links(len(tokens), batch.device)
        else:
            links = build_tree(upload(parents, np.int32, batch.device))
        drafts = upload(tokens, np.int32, batch.device)
        return DraftTree(drafts, links, is_chain, depths, node_counts, left_out=left_out)

    def release(self, request: Request) -> None:
        self._lookup.release(request.request_id)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "branches": self.branches,
            "min_match": self.min_match,
            "max_match": self.max_match,
            "corpus_tokens": 0 if self.corpus is None else len(self.corpus),
        }


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
