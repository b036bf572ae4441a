"""What a controller is: it is told of the step to come, and says how much to draft in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from inferlab.specdec.acceptance import UNKNOWN, Known
from inferlab.specdec.tree import Budget


class Outlook(NamedTuple):
    """What a step is about to be.

    Attributes:
        ladder: budgets of growing size that are worth telling apart for the drafter.
        requests: the sequences, by number.
        context: their mean length in tokens.
        remaining: new tokens that each may still get.
        able: for whom the drafter can draft at all, by place; None: for all.
        unread: tokens of each that the drafter must read before it can draft.
        waiting: other requests wait for the place of those that end.
        joining: others are being read, to be in the batch soon.
        packs: rows that are padding cost nothing.
        known: what the drafter says of its nodes.
        written: tokens of each that the target has chosen; empty: not known.
    """

    ladder: Sequence[Budget]
    requests: Sequence[int]
    context: float = 0.0
    remaining: Sequence[int] = ()
    unread: Sequence[int] = ()
    able: Sequence[int] | None = None
    waiting: bool = False
    joining: bool = False
    packs: bool = False
    known: Known = UNKNOWN
    written: Sequence[int] = ()

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return len(self.requests)


class Judge(Protocol):
    """Hears of drafts while they are made, and says what they are worth.

    Nodes are told apart by their kinds, see ``Drafter.kinds``.
    """

    def examined(
        self,
        requests: Sequence[int],
        sure: Sequence[Sequence[float]],
        right: Sequence[Sequence[bool]],
    ) -> bool:
        """Hears what drafts of texts that were just read would have been, and says whether to draft
        on.

        Args:
            sure: of each of the last tokens that the target chose, how sure the drafter was of its
                own choice there, in [0, 1].
            right: whether that was the target's.
        """
        return True

    def goes_on(self, requests: Sequence[int], kinds: Sequence[int]) -> bool:
        """Whether chains are worth another level: ``kinds`` of the last node of each."""
        ...

    def keep(self, requests: Sequence[int], kinds: Sequence[Sequence[int]]) -> list[int]:
        """How many of each sequence's nodes are to be verified: ``kinds`` of its nodes below the
        root, in the order of worth."""
        ...

    def followed(
        self,
        requests: Sequence[int],
        kinds: Sequence[Sequence[int]],
        accepted: Sequence[Sequence[int]],
    ) -> None:
        """Hears, of a drafter that looks drafts up, what became of those that it offered for these
        texts last, whether they were verified or not.

        Args:
            kinds: of those nodes of which it is known; none where there was no draft.
            accepted: the ranks, from 1 on, that each text went through.
        """
        return


class Choice(NamedTuple):
    """How much to draft.

    Attributes:
        budget: for each sequence at most: ``NO_DRAFT``, a rung of the ladder, or any other.
        members: for which sequences, by their place in the batch; None: for all.
        judge: who is asked about drafts; None: all that the budget allows is verified.
        steps: with ``NO_DRAFT``, how many steps of these requests this holds for: the controller
            is asked again and told of steps only behind them, see `Controller.rested`.
        gives_up: a drafter that must hear of every step hears no more of these texts.
    """

    budget: Budget
    members: Sequence[int] | None = None
    judge: Judge | None = None
    steps: int = 1
    gives_up: bool = False


class StepObservation(NamedTuple):
    """What a step told: its size, what it took and what was accepted.

    Attributes:
        batch_size: sequences.
        budget: what was drafted at most.
        step_ms: all of the step.
        depths: levels offered to each sequence.
        accepted: of each sequence, the ranks of the draft nodes that were accepted, from the root
            on: rank j is the j-th node that a budget of at least j nodes offers.
        caught_up: the drafter had to process tokens of earlier steps first, so its time says
            nothing about a usual step.
        rows: of the target's forward.
        draft_ms: of step_ms, what proposing took.
        heard: the drafter was told of it.
        came_true: of each sequence, whether the best draft node that was not verified would have
            been accepted; None: not known. Empty: of all.
    """

    batch_size: int
    budget: Budget
    step_ms: float
    depths: list[int]
    accepted: list[list[int]]
    caught_up: bool = False
    rows: int = 0
    draft_ms: float = 0.0
    heard: bool = False
    came_true: Sequence[bool | None] = ()


class Controller(ABC):
    """Chooses before each step how much is drafted, and hears how it went."""

    max_k: int
    """Levels that it may ask for."""

    @abstractmethod
    def choose(self, outlook: Outlook) -> Choice:
        """How much to draft in the next step."""

    def follows(self, tokens: int, outlook: Outlook) -> bool:
        """Whether the drafter is to hear of texts that are about to be read, ``tokens`` in all:
        asked of drafters that cannot draft for texts that they have not heard of. ``outlook``: of
        a step with all sequences, these included."""
        return True

    def observe(self, step: StepObservation) -> None:
        """Hears of a step."""
        return

    def rested(self, batch_size: int, steps_ms: Sequence[float], heard: bool) -> None:
        """Hears of steps without drafts that it was not told of one by one.

        Args:
            batch_size: sequences.
            steps_ms: all of each step.
            heard: the drafter was told of them.
        """
        return

    @abstractmethod
    def describe(self, since: Any = None) -> dict[str, Any]:
        """For reports: ``controller``, its name, what it was set to, and what it decided.

        Args:
            since: of `tally`, what it decided before is left out; None: all of it is told.
        """

    def tally(self) -> Any:
        """What it has decided so far, for `describe`."""
        return None
