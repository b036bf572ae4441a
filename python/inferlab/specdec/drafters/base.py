"""What a drafter is."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from inferlab.scheduler import Sequence
from inferlab.specdec.batch import Batch
from inferlab.specdec.tree import DraftTree


class Drafter(Protocol):
    """Proposes draft trees. It may be wrong as often as it likes: that costs time, not quality.

    Attributes:
        name: as in ``draft_mode``.
        max_nodes: nodes of its largest tree, root included.
        max_depth: levels of its largest tree.
    """

    name: str
    max_nodes: int
    max_depth: int

    def propose(self, batch: Batch, k: int) -> DraftTree:
        """A tree of at most ``k`` levels for each sequence of the batch; ``k >= 1``."""
        ...

    def commit(
        self, batch: Batch, tree: DraftTree, nodes: torch.Tensor, kept: torch.Tensor
    ) -> None:
        """Keeps its own cache in step, on the device, before the batch moves on.

        Args:
            nodes: [B, S] int32, the walk from the root.
            kept: [B] int32, how many entries of the walk are committed.
        """
        ...

    def settle(self, sequence: Sequence, tree: DraftTree, kept: int) -> None:
        """Hears on the host how many tokens of a step a sequence kept, before its length moves."""
        ...

    def is_lagging(self, batch: Batch) -> bool:
        """Whether ``propose`` must first process tokens of steps it took no part in."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Forgets a sequence that has left the batch."""
        ...

    def describe(self) -> dict[str, Any]: ...
