"""One decoding step of a batch: propose -> forward -> verify -> commit -> `Walk.read`.

Everything up to `Walk.read` is queued on the device without asking it; that is the one place where
the host waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from inferlab.kernels import VerifyResult
from inferlab.models import ForwardBatch, ForwardOutput, KVCache, TargetModel
from inferlab.models.transfer import upload
from inferlab.specdec.batch import Batch
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import DraftTree
from inferlab.specdec.walk import Walk

PHASES = ("prefill", "draft", "verify", "accept", "commit")


class Timeline(Protocol):
    """Who hears of phases as they come."""

    def begin(self, phase: str | None) -> None:
        """This phase begins; None: what comes is not known, or no phase."""
        ...

    def end(self, phase: str, begin_s: float, end_s: float) -> None:
        """A phase has ended; times are of ``time.perf_counter``."""
        ...


@dataclass
class Clock:
    """Milliseconds the host spent per phase since the engine started.

    On a CUDA device a phase ends when its work is queued: the wait for all of it is in ``accept``.

    Attributes:
        timeline: hears of every phase, while somebody profiles.
    """

    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    timeline: Timeline | None = None
    _mark: float = 0.0

    def start(self, first: str | None = None) -> None:
        """Sets the first mark of a step, or sets it anew; ``first``: the phase that begins."""
        self._mark = time.perf_counter()
        if self.timeline is not None:
            self.timeline.begin(first)

    def lap(self, phase: str, then: str | None = None) -> float:
        """Charges the time since the last mark to ``phase``; returns it in ms. ``then``: the phase
        that begins."""
        now = time.perf_counter()
        spent = (now - self._mark) * 1e3
        self.totals[phase] += spent
        if self.timeline is not None:
            self.timeline.end(phase, self._mark, now)
            self.timeline.begin(then)
        self._mark = now
        return spent

    def since_lap(self) -> float:
        """Ms since the last mark, which are charged to nothing."""
        return (time.perf_counter() - self._mark) * 1e3


def rows_of(target: TargetModel, batch: Batch, tree: DraftTree) -> ForwardBatch:
    """The nodes of a batch's trees as rows of the target's forward."""
    depth = tree.links.depth
    positions = batch.seq_lens[:, None] + depth
    limit = target.context_length
    if limit is not None:
        # Nodes that a sequence near its end can not keep anyway, and padding (depth -1).
        positions = positions.clamp(0, limit - 1)
    num_nodes = upload(tree.node_counts, np.int32, batch.device) if tree.is_ragged else None
    return ForwardBatch(
        tokens=tree.tokens.to(torch.int64),
        positions=positions.to(torch.int64),
        seq_lens=batch.seq_lens,
        block_table=batch.block_table,
        ancestors=None if tree.is_chain else tree.links.ancestors,
        num_nodes=num_nodes,
    )


def num_rows(tree: DraftTree, device: torch.device) -> int:
    """Rows of a forward: on a CPU without padding. Graphs of a CUDA device are kept by shape, which
    the nodes of ragged trees would make another in every step."""
    if device.type == "cpu":
        return sum(tree.node_counts)
    return len(tree.node_counts) * tree.num_nodes


def verify(
    policies: Sequence[Policy], output: ForwardOutput, tree: DraftTree, batch: Batch
) -> Walk:
    """Walks the trees of a batch.

    Args:
        policies: of each sequence, or one for all.
    """
    result = policies[0].verify(output.logits, tree, batch)
    for policy in set(policies) - {policies[0]}:
        own = torch.tensor([p == policy for p in policies], device=batch.device)
        other = policy.verify(output.logits, tree, batch)
        result = VerifyResult(
            *(
                torch.where(own.view(-1, *[1] * (mine.dim() - 1)), theirs, mine)
                for mine, theirs in zip(result, other, strict=True)
            )
        )
    entries = result.num_accepted
    return Walk(
        tree=tree,
        output=output,
        starts=[request.num_cached for request in batch.requests],
        seq_lens=batch.seq_lens,
        nodes=result.accepted_nodes,
        tokens=result.accepted_tokens,
        entries=entries,
        kept=entries if batch.limits is None else torch.minimum(entries, batch.limits),
    )


def commit(cache: KVCache, batch: Batch, walk: Walk) -> None:
    """Moves the target's K/V of the kept nodes to the front."""
    if not walk.tree.is_chain:
        cache.compact(batch.block_table, walk.seq_lens, walk.nodes, walk.kept)
