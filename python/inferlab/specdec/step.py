"""One decoding step of a batch: propose -> forward -> verify -> commit."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from inferlab.kernels import VerifyResult
from inferlab.models import ForwardBatch, KVCache, TargetModel
from inferlab.specdec.batch import Batch
from inferlab.specdec.drafters import Drafter
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import DraftTree

PHASES = ("prefill", "draft", "verify", "accept", "commit")


@dataclass
class Clock:
    """Milliseconds spent per phase since the engine started."""

    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _mark: float = 0.0

    def start(self) -> None:
        self._mark = time.perf_counter()

    def lap(self, phase: str) -> float:
        """Charges the time since the last mark to ``phase``; returns it in ms."""
        now = time.perf_counter()
        spent = (now - self._mark) * 1e3
        self.totals[phase] += spent
        self._mark = now
        return spent


def propose(drafter: Drafter | None, batch: Batch, k: int) -> DraftTree:
    """The draft trees of a step; only the roots where nothing is to be drafted."""
    if drafter is None or k < 1:
        return DraftTree.root_only(batch.roots)
    return drafter.propose(batch, k)


def forward(target: TargetModel, cache: KVCache, batch: Batch, tree: DraftTree) -> torch.Tensor:
    """The target's logits at every node, [B, N, V]; K/V of all nodes goes behind the committed."""
    depth = tree.links.depth
    positions = batch.seq_lens[:, None] + depth
    limit = target.context_length
    if limit is not None:
        # Nodes that a sequence near its end can not keep anyway, and padding (depth -1).
        positions = positions.clamp(0, limit - 1)
    num_nodes = None
    if tree.is_ragged:
        num_nodes = torch.tensor(tree.node_counts, dtype=torch.int32).to(batch.device)
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
    )


@dataclass
class Walk:
    """What verification accepted, on the host.

    ``nodes[b]`` and ``tokens[b]``: the walk of sequence b from its root, and the token emitted at
    each of its nodes, the bonus token last. A token of -1 marks logits that were NaN or all -inf.
    """

    nodes: list[list[int]]
    tokens: list[list[int]]
    device_nodes: torch.Tensor  # [B, S] int32


def verify(policy: Policy, logits: torch.Tensor, tree: DraftTree, batch: Batch) -> Walk:
    """Walks the trees; this is where the host waits for the device."""
    result: VerifyResult = policy.verify(logits, tree, batch)
    counts = result.num_accepted.tolist()
    nodes = result.accepted_nodes.tolist()
    tokens = result.accepted_tokens.tolist()
    return Walk(
        [row[:n] for row, n in zip(nodes, counts, strict=True)],
        [row[:n] for row, n in zip(tokens, counts, strict=True)],
        result.accepted_nodes,
    )


def commit(
    cache: KVCache,
    drafter: Drafter | None,
    batch: Batch,
    tree: DraftTree,
    walk: Walk,
    kept: list[int],
) -> None:
    """Moves the K/V of the kept nodes to the front, in the target's and the drafter's cache."""
    if tree.num_nodes == 1:
        return
    count = torch.tensor(kept, dtype=torch.int32).to(batch.device)
    if not tree.is_chain and any(
        nodes[:n] != list(range(n)) for nodes, n in zip(walk.nodes, kept, strict=True)
    ):
        cache.compact(batch.block_table, batch.seq_lens, walk.device_nodes, count)
    if drafter is not None:
        drafter.commit(batch, tree, walk.device_nodes, count)
