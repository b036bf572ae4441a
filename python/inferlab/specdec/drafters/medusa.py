"""Medusa: heads on the target's last hidden state, one per offset (Cai et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from inferlab import kernels
from inferlab.kernels.reference.noise import PURPOSE_DRAFT, PURPOSE_TOKEN
from inferlab.models import FINAL_HIDDEN, ForwardOutput
from inferlab.models.draft_heads import MedusaHeads
from inferlab.scheduler import Sequence
from inferlab.specdec.batch import Batch
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.features import LastFeatures
from inferlab.specdec.drafters.static import describe_shape, tree_of_offsets
from inferlab.specdec.tree import Budget, DraftTree, TreeShape


class MedusaDrafter(Drafter):
    """Drafts a static tree from one pass of the heads.

    Head i scores the tokens of depth i + 1 whatever the path there: a node's token is its head's
    best one of the node's rank, drawn with the target's own noise at that position.

    Args:
        heads: trained for the target.
        shape: the largest tree; at most as deep as there are heads.
        coupled: draw with the target's noise; False: with noise of its own.
    """

    name = "medusa"
    feature_layers = (FINAL_HIDDEN,)

    def __init__(self, heads: MedusaHeads, shape: TreeShape, *, coupled: bool = True) -> None:
        if shape.depth > heads.num_heads:
            raise ValueError(
                f"tree has {shape.depth} levels, but there are {heads.num_heads} Medusa heads; "
                f"draft at most that many levels"
            )
        self.heads = heads
        self.shape = shape
        self.coupled = coupled
        self.max_nodes = shape.num_nodes
        self.max_depth = shape.depth
        self._features = LastFeatures()

    def ladder(self) -> SequenceOf[Budget]:
        return self.shape.ladder(self.max_depth)

    @torch.inference_mode()
    def propose(self, batch: Batch, budget: Budget) -> DraftTree:
        shape = self.shape.within(budget)
        tokens = batch.roots.to(torch.int64) if self.heads.reads_token else None
        logits = self.heads.logits(self._features.of(batch)[:, -1], tokens, shape.depth)
        ahead = torch.arange(1, shape.depth + 1, device=batch.device)
        positions = batch.seq_lens.to(torch.int64)[:, None] + ahead
        drawn = kernels.sample(
            logits,
            positions,
            batch.sampling,
            purpose=PURPOSE_TOKEN if self.coupled else PURPOSE_DRAFT,
            num_samples=max(shape.widths),
        )
        return DraftTree.of_shape(shape, tree_of_offsets(batch.roots, drawn, shape))

    def prefill(self, batch: Batch, start: int, output: ForwardOutput) -> None:
        assert output.features is not None
        self._features.start(batch.sequences[0], output.features[0])

    def commit(
        self,
        batch: Batch,
        tree: DraftTree,
        nodes: torch.Tensor,
        kept: torch.Tensor,
        output: ForwardOutput,
    ) -> None:
        assert output.features is not None
        self._features.advance(batch, output.features, nodes, kept)

    def release(self, sequence: Sequence) -> None:
        self._features.release(sequence)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "heads": self.heads.num_heads,
            "tree": describe_shape(self.shape),
            "coupled_noise": self.coupled,
        }
