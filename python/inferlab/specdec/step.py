"""One decoding step of a batch: propose -> forward -> verify -> commit -> read.

Everything up to `read` is queued on the device without asking it; `read` is the one place where the
host waits for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from inferlab.models import ForwardBatch, ForwardOutput, KVCache, TargetModel
from inferlab.models.transfer import upload
from inferlab.specdec.batch import Batch
from inferlab.specdec.drafters import Drafter
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import Budget, DraftTree

PHASES = ("prefill", "draft", "verify", "accept", "commit")


@dataclass
class Clock:
    """Milliseconds the host spent per phase since the engine started.

    On a CUDA device a phase ends when its work is queued: the wait for all of it is in ``accept``.
    """

    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _mark: float = 0.0

    def start(self) -> None:
        """Sets the first mark of a step."""
        self._mark = time.perf_counter()

    def lap(self, phase: str) -> float:
        """Charges the time since the last mark to ``phase``; returns it in ms."""
        now = time.perf_counter()
        spent = (now - self._mark) * 1e3
        self.totals[phase] += spent
        self._mark = now
        return spent


def propose(drafter: Drafter | None, batch: Batch, budget: Budget) -> DraftTree:
    """The draft trees of a step; only the roots where nothing is to be drafted."""
    if drafter is None or min(budget) < 1:
        return DraftTree.root_only(batch.roots)
    return drafter.propose(batch, budget)


def forward(
    target: TargetModel,
    cache: KVCache,
    batch: Batch,
    tree: DraftTree,
    feature_layers: tuple[int, ...] = (),
) -> ForwardOutput:
    """The target's logits at every node, [B, N, V], and the hidden states that the drafter needs;
    K/V of all nodes goes behind the committed."""
    depth = tree.links.depth
    positions = batch.seq_lens[:, None] + depth
    limit = target.context_length
    if limit is not None:
        # Nodes that a sequence near its end can not keep anyway, and padding (depth -1).
        positions = positions.clamp(0, limit - 1)
    num_nodes = upload(tree.node_counts, np.int32, batch.device) if tree.is_ragged else None
    return target.forward(
        ForwardBatch(
            tokens=tree.tokens.to(torch.int64),
            positions=positions.to(torch.int64),
            seq_lens=batch.seq_lens,
            block_table=batch.block_table,
            ancestors=None if tree.is_chain else tree.links.ancestors,
            num_nodes=num_nodes,
        ),
        cache,
        feature_layers,
    )


class Walk(NamedTuple):
    """What verification accepted, on the device: walks from the roots, entries behind them -1.

    Attributes:
        nodes: [B, S] int32, the nodes visited.
        tokens: [B, S] int32, the token emitted at each, the bonus token last; -1 marks logits that
            were NaN or all -inf.
        accepted: [B] int32, entries of each walk.
        kept: [B] int32, how many of them are committed: all, but for `Batch.limits`.
    """

    nodes: torch.Tensor
    tokens: torch.Tensor
    accepted: torch.Tensor
    kept: torch.Tensor


def verify(policy: Policy, logits: torch.Tensor, tree: DraftTree, batch: Batch) -> Walk:
    """Walks the trees of a batch."""
    result = policy.verify(logits, tree, batch)
    accepted = result.num_accepted
    kept = accepted if batch.limits is None else torch.minimum(accepted, batch.limits)
    return Walk(result.accepted_nodes, result.accepted_tokens, accepted, kept)


def commit(
    cache: KVCache,
    drafter: Drafter | None,
    batch: Batch,
    tree: DraftTree,
    walk: Walk,
    output: ForwardOutput,
) -> None:
    """Moves the K/V of the kept nodes to the front, in both caches, and the batch behind them."""
    if not tree.is_chain:
        cache.compact(batch.block_table, batch.seq_lens, walk.nodes, walk.kept)
    if drafter is not None:
        drafter.commit(batch, tree, walk.nodes, walk.kept, output)
    batch.advance(walk.tokens, walk.kept)


class Outcome(NamedTuple):
    """A sequence's part of a step, on the host.

    Attributes:
        accepted: draft tokens accepted.
        nodes: the nodes visited, the root first.
        tokens: the tokens kept, the bonus token last.
    """

    accepted: int
    nodes: list[int]
    tokens: list[int]


def read(walk: Walk) -> list[Outcome]:
    """Waits for the step."""
    parts = (walk.accepted[:, None], walk.kept[:, None], walk.nodes, walk.tokens)
    length = walk.nodes.shape[1]
    return [
        Outcome(accepted - 1, rest[:accepted], rest[length : length + kept])
        for accepted, kept, *rest in torch.cat(parts, dim=1).tolist()
    ]
