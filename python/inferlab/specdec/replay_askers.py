"""Who says how much to draft in a replay: the same for each step, or a controller. No torch, where
that is not a controller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from inferlab.config_types import MAX_TREE_NODES
from inferlab.specdec.acceptance import Known

if TYPE_CHECKING:
    from inferlab.specdec.control import Controller, Judge

NOTHING = (0, 0)


class Going(NamedTuple):
    """A text of the step to come.

    Attributes:
        number: growing in the order in which they begin.
        tokens: so far.
        written: of these, those that the target chose.
        remaining: that it may still get.
        unread: that a draft model would first have to read.
    """

    number: int
    tokens: int
    written: int
    remaining: int
    unread: int


class Offered(NamedTuple):
    """The kinds of nodes that were looked up for a text, and the ranks that it went through."""

    kinds: Sequence[int] = ()
    accepted: Sequence[int] = ()


NOT_OFFERED = Offered()


class Asked(NamedTuple):
    """How much is to be drafted.

    Attributes:
        members: for which texts, by their places; None: for all.
        judge: who is told of it meanwhile; None: nobody.
        requests: these texts, as the judge knows them.
        writes: chains are drafted level by level while the judge wants more; else drafts are looked
            up, and it hears what became of them.
        examines: when the drafter has read a text, it hears how often it would have been right.
    """

    levels: int
    nodes: int
    members: Sequence[int] | None = None
    judge: Judge | None = None
    requests: Sequence[int] = ()
    writes: bool = False
    examines: bool = False

    def judged(
        self, kinds: Sequence[Sequence[int]], before: Sequence[Offered]
    ) -> tuple[list[int], int]:
        """Of texts whose nodes are of these kinds, in the order of worth: how many of each are to
        be verified, and how many were drafted for each at most. ``before``: the last ones."""
        assert self.judge is not None
        longest = max(map(len, kinds))
        if self.writes:
            # Of one whose chain is known less far the rest is as sure as its end.
            chains = [list(chain) + [chain[-1]] * (longest - len(chain)) for chain in kinds]
            count = 1
            while self.judge.goes_on(self.requests, [chain[count - 1] for chain in chains]):
                if count == longest:
                    break
                count += 1
            kinds, longest = [chain[:count] for chain in chains], count
        else:
            then, accepted = [list(b.kinds) for b in before], [list(b.accepted) for b in before]
            self.judge.followed(self.requests, then, accepted)
        return self.judge.keep(self.requests, kinds), longest


class Step(NamedTuple):
    """What a step on the virtual clock tells of itself.

    Attributes:
        levels, nodes: of the budget, as the engine limits it near the ends of texts.
        draft_ms: of ``ms``.
        depths: levels offered to each sequence.
        ranks: of the accepted nodes of each, see `StepObservation`, as what follows.
    """

    levels: int
    nodes: int
    ms: float
    draft_ms: float
    rows: int
    depths: list[int]
    ranks: list[list[int]]
    caught_up: bool = False
    came_true: Sequence[bool | None] = ()


class Asker(Protocol):
    """Who says how much to draft."""

    def ask(self, texts: Sequence[Going], waiting: bool) -> Asked:
        """``waiting``: others will take the places of these."""
        ...

    def hear(self, batch: int, told: Step) -> None:
        """Hears how the step went that was asked for last."""
        ...


class Always:
    """The same budget for each step; MAX_TREE_NODES: all nodes that the drafter has for so many
    levels."""

    def __init__(self, levels: int, nodes: int = MAX_TREE_NODES) -> None:
        self._asked = Asked(levels, nodes)

    def ask(self, texts: Sequence[Going], waiting: bool) -> Asked:
        return self._asked

    def hear(self, batch: int, told: Step) -> None:
        return


class Controlled:
    """A controller of the engine's.

    This is the one place that knows how controllers are asked and told.

    Args:
        controller: whose state goes on from where it is.
        about: of the recording, whose drafter it asks.
        first: number of the first text, above those that the controller has heard of.
    """

    def __init__(self, controller: Controller, about: Mapping[str, Any], first: int = 0) -> None:
        from inferlab.specdec.control import Outlook, StepObservation
        from inferlab.specdec.tree import Budget

        self._outlook, self._observation, self._budget = Outlook, StepObservation, Budget
        self._controller = controller
        self._ladder = tuple(Budget(*rung) for rung in about["ladder"])
        self._known = Known(**(about.get("known") or {}))
        self._tree = about["tree"]
        self._writes = self._tree["form"] == "chain" and not self._known.looks_up
        self._packs = about["machine"][2] == "cpu"
        self._nodes = 0
        self._first = first
        self._texts: list[int] = []
        self._asleep = 0
        self._sleeps = False
        self._slept: list[float] = []

    def ask(self, texts: Sequence[Going], waiting: bool) -> Asked:
        requests = [self._first + text.number for text in texts]
        if requests != self._texts:
            self._wake()
            self._texts = requests
        self._sleeps = self._asleep > 0
        if self._sleeps:
            self._asleep -= 1
            return Asked(*NOTHING)
        outlook = self._outlook(
            self._ladder,
            requests,
            sum(text.tokens for text in texts) / len(texts),
            [text.remaining for text in texts],
            [text.unread for text in texts] if self._writes else (),
            waiting=waiting,
            packs=self._packs,
            known=self._known,
            written=[text.written for text in texts],
        )
        choice = self._controller.choose(outlook)
        levels, nodes = choice.budget
        self._asleep = choice.steps - 1
        self._nodes = nodes
        if self._tree["form"] != "chain":  # chains are as long as the controller may ask
            levels = min(levels, self._tree["levels"])
            nodes = MAX_TREE_NODES if nodes >= self._tree["nodes"] else nodes
        members = choice.members
        told = requests if members is None else [requests[place] for place in members]
        examines = self._writes and self._known.examines
        return Asked(levels, nodes, members, choice.judge, told, self._writes, examines)

    def hear(self, batch: int, told: Step) -> None:
        if self._sleeps:
            self._slept.append(told.ms)
            if self._asleep == 0:
                self._wake()
            return
        budget = (told.levels, self._nodes) if told.nodes > 0 else NOTHING
        self._controller.observe(
            self._observation(
                batch,
                self._budget(*budget),
                told.ms,
                told.depths,
                told.ranks,
                caught_up=told.caught_up,
                rows=told.rows,
                draft_ms=told.draft_ms,
                heard=told.nodes > 0,
                came_true=told.came_true,
            )
        )

    def _wake(self) -> None:
        if self._slept:
            self._controller.rested(len(self._texts), self._slept, False)
        self._slept = []
        self._asleep = 0
