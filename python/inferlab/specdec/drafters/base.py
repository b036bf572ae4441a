"""What a drafter is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from inferlab.models import ForwardOutput
from inferlab.scheduler import Request
from inferlab.specdec.acceptance import UNKNOWN, Known
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.reading import Reading
from inferlab.specdec.tree import Budget, DraftTree
from inferlab.specdec.walk import Walk


class Drafter(ABC):
    """Proposes draft trees. It may be wrong as often as it likes: that costs time, not quality.

    Attributes:
        name: as in ``draft_mode``.
        max_nodes: the most nodes that it drafts, root included, whether its tree keeps them or not:
            so many slots are reserved behind each sequence.
        max_depth: levels of its largest tree.
        feature_layers: hidden states of the target that it needs (see
            `FINAL_HIDDEN`).
        keeps_nodes: keeps state, such as K/V, of the nodes of its own tree. In an ensemble
            ``commit`` then gets a walk of that tree, as far as the step's walk stayed in it, while
            ``output`` belongs to the merged tree; others get the walk of the merged tree.
        hears_all: needs what the target says in every step: it drafts no longer for a text of which
            it was not told a step.
        known: what it says of its nodes before any was verified.
    """

    name: str
    max_nodes: int
    max_depth: int
    feature_layers: tuple[int, ...] = ()
    keeps_nodes: bool = False
    hears_all: bool = False
    known: Known = UNKNOWN

    @abstractmethod
    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        """A tree within the budget (at least one level and node) for each request of the batch.

        Args:
            judge: says which nodes are worth it, to drafters that know more of them than their
                ranks (``known.by_kind``).
        """

    def ladder(self) -> Sequence[Budget]:
        """Budgets of growing size that are worth telling apart. By default: levels of a chain."""
        return [Budget(k, k) for k in range(1, self.max_depth + 1)]

    def prefill(self, reading: Reading, output: ForwardOutput) -> None:
        """Hears what the target has read: chunks of texts, in order for each of them.

        Args:
            output: features of all rows.
        """
        return

    def commit(self, batch: Batch, walk: Walk) -> None:
        """Keeps its own state in step, on the device.

        Called after every step, also where it drafted nothing. What the host knows of the step
        (``walk.kept_on_host``) is there when ``propose`` or ``unread`` is called next.
        """
        return

    def unread(self, batch: Batch) -> list[int]:
        """Tokens of each request that ``propose`` must process first, beyond those of the step
        before: of prompts, and of steps it took no part in."""
        return [0] * len(batch)

    def adopt(self, request: Request) -> int:
        """Takes over what it holds of shared pages that a request begins on.

        Returns:
            How many of the ``num_cached`` tokens in them the target need not read once more for
            this drafter to hear of them.
        """
        return request.num_cached

    def release(self, request: Request) -> None:
        """Forgets a request: it has left the batch, or its text will be read anew."""
        return

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """For reports: ``drafter``, its name, and what it was set to."""
