"""What recorded steps took, and what others would take. No torch.

A recorded step's own ms, times what the cost model says of the other tree against the recorded one;
steps that were not recorded, by the cost model alone, which is scaled to the run. The model is that
of the machine (`inferlab.specdec.costs`), kept with the recording, or else fitted to the recorded
steps, which know only the sizes that they had.
"""

from __future__ import annotations

import numpy as np

from inferlab.specdec.costs import CostModel, DraftCosts, DraftTime, StepCosts, StepTime
from inferlab.specdec.cuts import Trees
from inferlab.specdec.recorded import CATCHING_UP, FIRST, PHASES, Recording


class Times:
    """What steps took, and what others would take.

    Attributes:
        ms: of each recorded step.
        measured: the cost model is the machine's; False: it was fitted to the recorded steps.
        off: median of |predicted / recorded - 1| over the decoding steps.
    """

    def __init__(self, recording: Recording, trees: Trees, costs: CostModel | None) -> None:
        c = recording.columns
        self.ms = c["step.ms"].sum(axis=1, dtype=np.float64)
        draft = c["step.ms"][:, PHASES.index("draft")].astype(np.float64)
        steps = len(self.ms)
        self.batch = c["step.rows"].astype(np.int64)
        self.levels = c["step.levels"].astype(np.int64)
        self._most_levels = int(self.levels.max(initial=0))
        if not trees.chain:
            self._most_levels = int(trees.tree["levels"])
        self.nodes = np.zeros(steps, np.int64)
        step = trees.step[: trees.real]
        np.maximum.at(self.nodes, step, trees.drafted[: trees.real])
        roots = np.bincount(step, c["row.root"], steps)
        self.context = roots / np.maximum(self.batch, 1)
        kind = c["step.kind"]
        usual = np.flatnonzero((kind != FIRST) & (kind != CATCHING_UP) & (self.ms > draft))
        if not len(usual):
            usual = np.flatnonzero((kind != FIRST) & (self.ms > draft))
        self.measured = costs is not None
        self._costs = costs if costs is not None else self._fitted(usual, draft)
        self._step_scale = self._draft_scale = 1.0
        self.off = 0.0
        if len(usual):
            step_ms, draft_ms = np.array([self._parts(int(s)) for s in usual]).T
            self._step_scale = (self.ms - draft)[usual].sum() / max(step_ms.sum(), 1e-9)
            if draft_ms.sum() > 0 and draft[usual].sum() > 0:
                self._draft_scale = draft[usual].sum() / draft_ms.sum()
            predicted = step_ms * self._step_scale + draft_ms * self._draft_scale
            self.off = float(np.median(np.abs(predicted / self.ms[usual] - 1)))

    def _parts(self, step: int) -> tuple[float, float]:
        batch, nodes = int(self.batch[step]), int(self.nodes[step])
        ms = self._costs.step.ms(batch, 1 + nodes, self.context[step])
        return ms, self._drafting(batch, nodes, int(self.levels[step]))

    def _drafting(self, batch: int, nodes: int, levels: int) -> float:
        """Costs are measured with the most levels that so many nodes can have; each takes as much
        as the others."""
        most = min(nodes, self._most_levels)
        nothing, whole = (self._costs.draft.ms(batch, n) for n in (0, nodes))
        return nothing + (whole - nothing) * min(levels / most, 1.0) if most > 0 else whole

    def _fitted(self, usual: np.ndarray, draft: np.ndarray) -> CostModel:
        """From medians of steps of one batch, tree and context, in steps of 64 tokens."""
        if not len(usual):
            return CostModel(StepCosts((1,), (max(float(self.ms.mean()), 1e-3),)))
        alike: dict[tuple[int, int, int], list[int]] = {}
        for s in usual.tolist():
            context = int(self.context[s]) // 64 * 64 + 32
            alike.setdefault((int(self.batch[s]), int(self.nodes[s]), context), []).append(s)
        steps = [
            StepTime(b, 1 + n, context, float(np.median((self.ms - draft)[found])))
            for (b, n, context), found in alike.items()
        ]
        by_size: dict[tuple[int, int], list[int]] = {}
        for (b, n, _), found in alike.items():
            by_size.setdefault((b, n), []).extend(found)
        times = [
            DraftTime(b, n, float(np.median(draft[found]))) for (b, n), found in by_size.items()
        ]
        return CostModel(StepCosts.fit(steps), DraftCosts.of(times))

    def predicted(self, batch: int, levels: int, nodes: int, context: float) -> float:
        """A step of any size."""
        step = self._costs.step.ms(batch, 1 + nodes, context) * self._step_scale
        return step + self._drafting(batch, nodes, levels) * self._draft_scale

    def changed(self, step: int, levels: int, nodes: int) -> float:
        """A recorded step, had its largest tree had so many levels and draft nodes."""
        ms, was = float(self.ms[step]), (int(self.levels[step]), int(self.nodes[step]))
        if nodes == was[1] and min(levels, nodes) == min(was):
            return ms
        batch, context = int(self.batch[step]), float(self.context[step])
        before = self.predicted(batch, *was, context)
        return ms * self.predicted(batch, levels, nodes, context) / before if before > 0 else ms
