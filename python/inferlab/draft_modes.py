"""The table of draft modes: who drafts, and what suits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TreeKind = Literal["chain", "optimal", "grown", "widths"]


@dataclass(frozen=True)
class DraftMode:
    """The facts of one ``draft_mode``.

    Attributes:
        plan: what makes the drafter: ``module:function`` in ``inferlab.specdec.drafters``; the
            function takes a `DraftRequest`. "" drafts nothing.
        levels: K where ``max_draft`` is left out: levels drafted per step.
        nodes: below the root, where ``tree_nodes`` is left out.
        tree: what it drafts where ``tree`` is left out; None: trees of its own making.
        trees: what ``tree`` may ask for.
        no_tree: why it may ask for nothing else, and what to do instead.
        is_member: whether an ensemble may have it.
        has_probabilities: whether it can say how probable its drafts are, as the ``rejection``
            policy needs.
        reads_hidden: whether it needs the target's hidden states, so real weights.
    """

    plan: str
    levels: int = 4
    nodes: int = 31
    tree: TreeKind | None = "chain"
    trees: tuple[TreeKind, ...] = ()
    no_tree: str = ""
    is_member: bool = False
    has_probabilities: bool = False
    reads_hidden: bool = False


DRAFT_MODES = {
    "vanilla": DraftMode(
        "vanilla:plan",
        trees=("chain", "optimal", "widths"),
        is_member=True,
        has_probabilities=True,
    ),
    "ngram": DraftMode(
        "ngram:plan",
        levels=8,
        trees=("chain", "widths"),
        no_tree="where a match was says nothing of ranks: use 'chain', or children per node by "
        "depth: [4, 2, 1]",
        is_member=True,
    ),
    "recycling": DraftMode(
        "recycling:plan",
        levels=6,
        nodes=80,  # as in the paper
        tree="optimal",
        trees=("chain", "optimal", "widths"),
        is_member=True,
    ),
    "self": DraftMode(
        "vanilla:plan_self",
        trees=("chain", "optimal", "widths"),
        is_member=True,
        reads_hidden=True,
    ),
    "medusa": DraftMode(
        "medusa:plan",
        levels=6,
        tree="grown",
        trees=("chain", "optimal", "grown", "widths"),
        is_member=True,
        reads_hidden=True,
    ),
    "eagle": DraftMode(
        "eagle:plan",
        levels=6,
        tree="grown",
        trees=("chain", "optimal", "grown", "widths"),
        is_member=True,
        reads_hidden=True,
    ),
    "ensemble": DraftMode(
        "ensemble:plan",
        levels=6,
        tree=None,
        no_tree="its members draft trees of their own: leave it out, or bound tree_nodes",
    ),
    "medusa-lite": DraftMode(
        "lite:plan_medusa", no_tree="it drafts a chain: leave it out", reads_hidden=True
    ),
    "eagle-lite": DraftMode(
        "lite:plan_eagle", no_tree="it drafts a chain: leave it out", reads_hidden=True
    ),
    "none": DraftMode("", trees=("chain", "optimal", "widths")),
}


def tree_misfit(draft_mode: str, tree: str | tuple[int, ...] | None) -> str:
    """Why a draft mode has no such tree and what to use instead; "" where it has."""
    mode = DRAFT_MODES[draft_mode]
    if tree is None or (tree if isinstance(tree, str) else "widths") in mode.trees:
        return ""
    if tree == "grown":
        grow = " and ".join(repr(n) for n, m in DRAFT_MODES.items() if "grown" in m.trees)
        return f"only {grow} grow trees: use 'optimal', or children per node by depth: [4, 2, 1]"
    return mode.no_tree
