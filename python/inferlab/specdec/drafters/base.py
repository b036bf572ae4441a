"""What a drafter is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from inferlab.models import ForwardOutput
from inferlab.scheduler import Sequence
from inferlab.specdec.batch import Batch
from inferlab.specdec.tree import Budget, DraftTree


class Drafter(ABC):
    """Proposes draft trees. It may be wrong as often as it likes: that costs time, not quality.

    Attributes:
        name: as in ``draft_mode``.
        max_nodes: the most nodes that it drafts, root included, whether its tree keeps them or not:
            so many slots are reserved behind each sequence.
        max_depth: levels of its largest tree.
        feature_layers: hidden states of the target that it needs (see
            ``ForwardBatch.feature_layers``).
        keeps_nodes: keeps state, such as K/V, of the nodes of its own tree. In an ensemble
            ``commit`` and ``settle`` then get that tree, a walk in its numbers and how much of it
            was in that tree, while ``output`` belongs to the merged tree; others get the merged
            tree and its whole walk.
    """

    name: str
    max_nodes: int
    max_depth: int
    feature_layers: tuple[int, ...] = ()
    keeps_nodes: bool = False

    @abstractmethod
    def propose(self, batch: Batch, budget: Budget) -> DraftTree:
        """A tree within the budget (at least one level and node) for each sequence of the batch."""

    def ladder(self) -> SequenceOf[Budget]:
        """Budgets of growing size that are worth telling apart. By default: levels of a chain."""
        return [Budget(k, k) for k in range(1, self.max_depth + 1)]

    def prefill(self, batch: Batch, start: int, output: ForwardOutput) -> None:
        """Hears of a chunk of a prompt, the only sequence of ``batch``, that the target has read.

        Args:
            start: position of its first token; ``batch.seq_lens`` is behind the chunk.
            output: features of all its tokens, logits of the last one.
        """
        return

    def commit(
        self,
        batch: Batch,
        tree: DraftTree,
        nodes: torch.Tensor,
        kept: torch.Tensor,
        output: ForwardOutput,
    ) -> None:
        """Keeps its own state in step, on the device, before the batch moves on.

        Called after every step, also where it drafted nothing.

        Args:
            nodes: [B, S] int32, the walk from the root.
            kept: [B] int32, how many entries of the walk are committed.
            output: of the target, for all nodes of the tree.
        """
        return

    def settle(self, sequence: Sequence, tree: DraftTree, kept: int) -> None:
        """Hears on the host how many tokens of a step a sequence kept, before its length moves."""
        return

    def is_lagging(self, batch: Batch) -> bool:
        """Whether ``propose`` must first process tokens of steps it took no part in."""
        return False

    def release(self, sequence: Sequence) -> None:
        """Forgets a sequence that has left the batch."""
        return

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """For reports: ``drafter``, its name, and what it was set to."""
