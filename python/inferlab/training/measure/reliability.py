"""Are draft nodes accepted as often as predicted: a reliability diagram, and its error in a number.

Predicted is what `Acceptance` or, of drafters that tell their nodes apart by rank, `Ranks` says of
a node before it is verified: the chance that the walk goes through it, whatever else it goes
through. So of every node that was verified it is counted whether it was accepted, also of those
whose parent was not. The expected calibration error is the mean over the nodes of the distance
between the two, bin by bin (Naeini et al., "Obtaining well calibrated probabilities", 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from inferlab.config import SpecdecConfig
from inferlab.models import TargetModel
from inferlab.plots import new_figure
from inferlab.specdec.acceptance import Acceptance, Ranks
from inferlab.specdec.control import Choice, Judge, Outlook, StepObservation
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.tree import Budget

BINS = 10


class Bin(NamedTuple):
    """Nodes whose predicted chances are alike.

    Attributes:
        low, high: chances in [low, high); the last bin has 1, too.
        nodes: how many there were.
        predicted: their mean chance; 0 without any.
        accepted: the share that was accepted; 0 without any.
    """

    low: float
    high: float
    nodes: int
    predicted: float
    accepted: float


class Reliability:
    """Predicted chances of nodes, and which of them were accepted."""

    def __init__(self) -> None:
        self._nodes = [0] * BINS
        self._predicted = [0.0] * BINS
        self._accepted = [0] * BINS

    def add(self, predicted: Sequence[float], accepted: Sequence[int]) -> None:
        """A sequence in a step: chances of its nodes by rank, and the ranks, from 1 on, that its
        walk went through."""
        for rank, chance in enumerate(predicted, start=1):
            at = min(int(chance * BINS), BINS - 1)
            self._nodes[at] += 1
            self._predicted[at] += chance
            self._accepted[at] += rank in accepted

    @property
    def bins(self) -> list[Bin]:
        """Of growing chances."""
        rows = zip(self._nodes, self._predicted, self._accepted, strict=True)
        return [
            Bin(at / BINS, (at + 1) / BINS, n, predicted / max(n, 1), accepted / max(n, 1))
            for at, (n, predicted, accepted) in enumerate(rows)
        ]

    @property
    def nodes(self) -> int:
        """That were verified."""
        return sum(self._nodes)

    def error(self, least: float = 0.0) -> float:
        """The expected calibration error, in [0, 1], in the bins of chances of at least ``least``:
        most nodes of a large tree are unlikely, and said to be."""
        bins = [b for b in self.bins if b.low >= least]
        off = sum(b.nodes * abs(b.predicted - b.accepted) for b in bins)
        return off / max(sum(b.nodes for b in bins), 1)


class PredictingController(FixedController, Judge):
    """Drafts all of K levels in every step, and predicts, with what the cost controller predicts
    with and learns from, which of the nodes will be accepted."""

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.found = Reliability()
        self._ladder: Sequence[Budget] = ()
        self._by_kind: Acceptance | None = None
        self._by_rank = Ranks(0, ())
        self._requests: Sequence[int] = ()
        self._kinds: Sequence[Sequence[int]] | None = None

    def choose(self, outlook: Outlook) -> Choice:
        if outlook.ladder is not self._ladder:
            self._ladder, known = outlook.ladder, outlook.known
            self._by_rank = Ranks(self._ladder[-1].nodes, known.by_rank)
            if known.by_kind:
                self._by_kind = Acceptance(known.by_kind, known.evidence)
        self._kinds = None
        judge = None if self._by_kind is None else self
        return super().choose(outlook)._replace(judge=judge)

    def goes_on(self, requests: Sequence[int], kinds: Sequence[int]) -> bool:
        """See `Judge`: down to the last level."""
        return True

    def keep(self, requests: Sequence[int], kinds: Sequence[Sequence[int]]) -> list[int]:
        """See `Judge`: all of it."""
        self._requests, self._kinds = requests, kinds
        return [len(of_nodes) for of_nodes in kinds]

    def observe(self, step: StepObservation) -> None:
        if self._by_kind is not None:
            if self._kinds is None:
                return
            for request, kinds, ranks in zip(
                self._requests, self._kinds, step.accepted, strict=True
            ):
                self.found.add(self._by_kind.of(request, kinds), ranks)
            self._by_kind.learn(self._requests, self._kinds, step.accepted)
        elif step.budget.levels == min(self.max_k, self._ladder[-1].levels):
            # Trees of fewer levels, near the end of a text, count their ranks otherwise.
            predicted = self._by_rank.chances
            for ranks in step.accepted:
                self.found.add(predicted, ranks)
            self._by_rank.learn(len(predicted), step.accepted)


def reliability(
    config: SpecdecConfig,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    target: TargetModel | None = None,
    draft: TargetModel | None = None,
) -> Reliability:
    """Of the drafter that ``config`` names, decoding these prompts; see above.

    Args:
        target, draft: loaded models in place of those that ``config`` names.
    """
    controller = PredictingController(config.levels)
    SpeculativePipeline(config=config, controller=controller, target=target, draft=draft).generate(
        prompts, seed=[config.seed + index for index in range(len(prompts))]
    )
    return controller.found


def draw_reliability(file: Path, found: Reliability, *, title: str) -> None:
    """Writes a PNG: by predicted chance, the share accepted, and how many nodes there were.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = new_figure(5, 6)
    share, count = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    seen = [b for b in found.bins if b.nodes]
    share.plot((0, 1), (0, 1), color="gray", linestyle=":")
    share.plot([b.predicted for b in seen], [b.accepted for b in seen], marker="o")
    share.set(
        title=f"{title}: ECE {found.error():.3f}", ylabel="accepted", xlim=(0, 1), ylim=(0, 1)
    )
    middles = [(b.low + b.high) / 2 for b in found.bins]
    count.bar(middles, [b.nodes for b in found.bins], width=0.9 / BINS)
    count.set(xlabel="predicted chance", ylabel="nodes", yscale="log")
    figure.savefig(file, dpi=100)
