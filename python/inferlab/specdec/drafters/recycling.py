"""Token recycling: drafts from the target's own runners-up (Luo et al., "Turning Trash into
Treasure", 2024).

A table holds, for every token, the tokens that the target last ranked highest behind it. It is
filled from the logits of every node that is verified, accepted or not, and drafting is looking up
successors of successors. One table serves all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from inferlab import kernels
from inferlab.draft_modes import DRAFT_MODES
from inferlab.specdec.acceptance import Known
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.plan import DrafterPlan, DraftRequest
from inferlab.specdec.drafters.static import describe_shape
from inferlab.specdec.tree import Budget, DraftTree, TreeShape
from inferlab.specdec.walk import Walk
from inferlab.types import check

SUCCESSORS = 8

# P(a token's r-th successor in the table is the target's choice), of the bundled target at
# temperature 0: what `python benchmarks/recycling_acceptance.py` prints, rounded.
ACCEPTANCE = (0.73, 0.08, 0.035, 0.018, 0.015, 0.009, 0.007, 0.005)
TREE_NODES = DRAFT_MODES["recycling"].nodes
TREE_DEPTH = 8


class RecyclingDrafter(Drafter):
    """Drafts from a table of each token's likeliest successors, kept on the device.

    Args:
        vocab_size: of the target.
        device: of the target.
        shape: the largest tree, of at most ``successors`` children a node; by default the best 80
            nodes by ACCEPTANCE.
        successors: tokens kept for each token.
    """

    name = "recycling"

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        shape: TreeShape | None = None,
        successors: int = SUCCESSORS,
    ) -> None:
        check("recycling successors", successors, successors >= 1, "an integer >= 1")
        if shape is None:
            shape = TreeShape.best([ACCEPTANCE[:successors]], TREE_NODES, TREE_DEPTH)
        widest = max(shape.widths, default=0)
        check(
            "recycling tree",
            list(shape.widths),
            widest <= successors,
            f"at most {successors} children wide, the successors kept of each token",
        )
        self.shape = shape
        self.known = Known(by_rank=shape.chances([ACCEPTANCE]))
        self.successors = successors
        self.max_nodes = shape.num_nodes
        self.max_depth = shape.depth
        # The last row takes what is not to be kept. A token that was never seen has the successor
        # 0, a valid token like any other.
        self.table = torch.zeros((vocab_size + 1, successors), dtype=torch.int64, device=device)
        # When each row was written, in nodes: the newest write to a row is the one that counts.
        self._written = torch.full((vocab_size + 1,), -1, dtype=torch.int64, device=device)
        self._nodes_seen = 0

    def ladder(self) -> Sequence[Budget]:
        return self.shape.ladder(self.max_depth)

    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        shape = self.shape.within(budget)
        roots = batch.roots.to(torch.int64)[:, None]
        successors = self.table.view(-1)
        levels = [roots]
        for parents, ranks in _lookups(shape, batch.device):
            above = levels[-1].index_select(1, parents)
            levels.append(successors.take(above * self.successors + ranks))
        return DraftTree.of_shape(shape, torch.cat(levels, dim=1).to(torch.int32))

    def commit(self, batch: Batch, walk: Walk) -> None:
        padding = walk.tree.links.depth < 0
        tokens = walk.tree.tokens.masked_fill(padding, self.table.shape[0] - 1)
        self._learn(tokens, walk.output.logits, batch.allowed_vocab)

    def _learn(self, tokens: torch.Tensor, logits: torch.Tensor, allowed_vocab: int | None) -> None:
        """Takes the best tokens behind each node. ``tokens``: [B, N] int32, ``logits``: [B, N, V].

        Where several nodes hold one token the last one counts, whatever order the device writes in.
        """
        best = kernels.sample(
            logits,
            _zeros(tokens.shape, tokens.device),
            _greedy(tokens.shape[0], tokens.device),
            num_samples=self.successors,
            allowed_vocab=allowed_vocab,
        )
        rows = tokens.reshape(-1).to(torch.int64)
        start = self._nodes_seen
        self._nodes_seen += len(rows)
        order = torch.arange(start, self._nodes_seen, device=rows.device)
        self._written.scatter_reduce_(0, rows, order, "amax")
        newest = self._written.index_select(0, rows) - start
        best = best.view(len(rows), -1).index_select(0, newest).clamp_min(0).to(torch.int64)
        self.table.index_copy_(0, rows, best)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "successors": self.successors,
            "tree": describe_shape(self.shape),
        }


@lru_cache(maxsize=512)
def _lookups(shape: TreeShape, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each level: where in the level above its nodes' parents are, and which successors they
    take; [M] int64 both."""
    lookups = []
    for depth, level in enumerate(shape.levels):
        first = shape.levels[depth - 1].start if depth > 0 else 0
        parents = [shape.parents[n] - first for n in level]
        ranks = [shape.sibling_ranks[n] for n in level]
        lookups.append((torch.tensor(parents, device=device), torch.tensor(ranks, device=device)))
    return lookups


@lru_cache(maxsize=64)
def _greedy(size: int, device: torch.device) -> kernels.SamplingTensors:
    return kernels.SamplingTensors.of(size, device=device)


@lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=device)


def plan(request: DraftRequest) -> DrafterPlan:
    """Drafts from the target's runners-up."""
    config, target = request.config, request.target
    if request.given_shape is None and config.tree in (None, "optimal"):
        # The table's own rates, not those of a draft: there is one tree that is best.
        depth = TREE_DEPTH if config.max_draft is None else request.max_levels
        shape = TreeShape.best([ACCEPTANCE], config.nodes, depth)
    else:
        shape = request.shape("optimal", request.max_levels, "")
    return DrafterPlan(lambda _: RecyclingDrafter(target.vocab_size, target.device, shape))
