"""Recorded runs decoded again without their models: other budgets, policies, controllers. No torch.

The output of a lossless run is seed-exact: whatever is drafted, the text is the recorded one. So a
setting is judged by walking that text again. A step that begins where a recorded step began has
its tree, cut to what the setting asks for (`inferlab.specdec.cuts` says when that is exactly what
would have been). Where the record holds only a part of that tree, that part's walk counts, and
where it went through all of it, what such walks get further on average. A step that begins behind a
token of a recorded walk goes as far as that walk did, which is exact of drafters that go by the
text alone; one that begins elsewhere goes on by the mean of the recorded trees. ``covered`` is the
share of steps that are exact.

Times are those of `inferlab.specdec.replay_times`.

Requests run as they were recorded: one begins when those have ended that had ended when it began.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from inferlab.config_types import MAX_TREE_NODES
from inferlab.specdec.costs import CostModel
from inferlab.specdec.cuts import REPLAYABLE, Rule, Trees
from inferlab.specdec.recorded import Recording
from inferlab.specdec.replay_askers import Asker
from inferlab.specdec.replay_run import Replayed, Rows, Run, Walked, typical
from inferlab.specdec.replay_times import Times

logger = logging.getLogger(__name__)


class Cell(NamedTuple):
    """A point of a grid: steps of ``batch`` texts in mid-decoding, all with this budget.

    Attributes:
        accepted_length: tokens per step, at the recorded roots.
        covered: share of these steps that are exact.
    """

    levels: int
    nodes: int
    batch: int
    accepted_length: float
    tokens_per_second: float
    covered: float


class Replay:
    """A recording, to be decoded again.

    Args:
        recording: of `inferlab.specdec.recorded.read_recording`.
        costs: of the machine; None: those in the recording, else, and where these cannot be read,
            fitted to it.
    """

    def __init__(self, recording: Recording, costs: CostModel | None = None) -> None:
        self.recording = recording
        self.about = recording.about
        self.trees = Trees(recording)
        kept = self.about.get("costs")
        if costs is None and isinstance(kept, str):
            try:
                costs = CostModel.from_json(kept)
            except ValueError as error:  # of another version; they can be fitted
                logger.warning("the costs in %s are not read: %s", recording.folder, error)
        self.times = Times(recording, self.trees, costs)
        self._cuts: dict[tuple[int, int, Rule], Rows] = {}
        self._kinds: dict[int, list[list[int]]] = {}
        c, trees = recording.columns, self.trees
        count = len(c["request.id"])
        self.row_at: list[dict[int, int]] = [{} for _ in range(count)]
        roots = trees.columns["row.root"].tolist()
        for row, (request, root) in enumerate(zip(trees.request.tolist(), roots, strict=True)):
            if row < trees.real or root not in self.row_at[request]:
                self.row_at[request][root] = row
        request_of, step_of = trees.request[: trees.real], trees.step[: trees.real]
        ends = np.zeros(count, np.int64)
        np.maximum.at(ends, request_of, step_of)
        starts = np.full(count, np.iinfo(np.int64).max)
        np.minimum.at(starts, request_of, step_of)
        # A request begins when as many have ended as had when it began.
        self.order = np.argsort(starts, kind="stable").tolist()
        self.waits = np.searchsorted(np.sort(ends), starts, side="left").tolist()
        self.by_end = np.argsort(ends, kind="stable").tolist()

    @property
    def rule(self) -> Rule:
        """The recorded policy. It may be one that cannot be replayed."""
        policy = self.about["policy"]
        return Rule(policy["policy"], float(policy.get("tau", policy.get("k", 0.0))))

    @property
    def levels(self) -> int:
        """Most levels that were asked for."""
        c = self.recording.columns
        return int(c["step.levels"].max(initial=0))

    def recorded(self) -> Replayed:
        """The run as it was: its walks are walked again, where the policy can be, in its times."""
        c, trees = self.recording.columns, self.trees
        accepted = c["row.accepted"].astype(np.int64)
        disagree = 0
        if self.rule.policy in REPLAYABLE:
            walked = (trees.path(self.rule) >= 0).sum(axis=1)[: trees.real]
            disagree = int((walked != accepted).sum())
            accepted = walked
        emitted = c["row.emitted"].astype(np.int64)
        result = Replayed(
            tokens=int(emitted.sum()),
            steps=self.recording.num_steps,
            ms=float(self.times.ms.sum()),
            disagree=disagree,
        )
        kept = np.minimum(accepted, emitted).tolist()
        for *where, number in zip(
            c["row.request"].tolist(), c["row.root"].tolist(), kept, strict=True
        ):
            result.add(where[0], Walked(where[1], number, True))
        return result

    def run(self, asker: Asker, rule: Rule | None = None, together: int | None = None) -> Replayed:
        """The run under another setting.

        Args:
            asker: how much is drafted.
            rule: who accepts; None: as recorded.
            together: texts decoded in one batch, one batch behind the other, the last filled up
                from the first texts; its steps then take what the cost model says, those that
                read a prompt, too. None: as recorded.

        Raises:
            UsageError: the policy cannot be replayed.
        """
        run = Run(self, asker, (rule or self.rule).check())
        return run.decode() if together is None else run.decode_together(together)

    def grid(
        self,
        levels: Sequence[int],
        nodes: Sequence[int],
        batches: Sequence[int],
        rule: Rule | None = None,
    ) -> list[Cell]:
        """Steps of every size, as they would be in mid-decoding at the recorded roots."""
        rule = (rule or self.rule).check()
        decoding = self.trees.decoding
        cells = []
        context = float(self.recording.columns["row.root"].mean()) if len(decoding) else 0.0
        for k in levels:
            for n in nodes:
                cut = self.trees.cut(k, n, rule)
                length = cut.mean_emitted(decoding)
                covered = float(cut.exact[decoding].mean()) if decoding.any() else 1.0
                offered = typical(cut, decoding)
                for batch in batches:
                    ms, _ = self.times.predicted(batch, k, offered, context)
                    cells.append(Cell(k, n, batch, length, batch * length / ms * 1e3, covered))
        return cells

    @cached_property
    def stand_ins(self) -> list[int]:
        """Recorded rows whose nodes are told apart by kinds."""
        whole = self.kinds(MAX_TREE_NODES)
        return [row for row in np.flatnonzero(self.trees.decoding).tolist() if whole[row]]

    def kinds(self, levels: int) -> list[list[int]]:
        """See `Trees.kinds`."""
        if levels not in self._kinds:
            self._kinds[levels] = self.trees.kinds(levels)
        return self._kinds[levels]

    def rows(self, levels: int, nodes: int, rule: Rule) -> Rows:
        key = (levels, nodes, rule)
        if key not in self._cuts:
            self._cuts[key] = Rows.of(self.trees.cut(levels, nodes, rule), self.trees.decoding)
        return self._cuts[key]
