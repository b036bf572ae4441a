"""What recorded steps took, and what others would take. No torch.

A recorded step's own ms, times what the cost model says of the other tree against the recorded one;
steps that were not recorded, by the cost model alone, which is scaled to the run, for each batch
size. The model is that of the machine (`inferlab.specdec.costs`), kept with the recording, or else
fitted to the recorded steps, which know only the sizes that they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inferlab.specdec.costs import CostModel, DraftCosts, DraftTime, StepCosts, StepTime
from inferlab.specdec.cuts import Trees
from inferlab.specdec.recorded import CATCHING_UP, FIRST, PHASES, Recording

LEAST = 8
"""Steps of one batch size that say something of it."""


class Scale:
    """What predicted times are to be multiplied with, by batch size: on lines between recorded
    sizes, over their logarithms."""

    def __init__(self, sizes: Sequence[float] = (1,), factors: Sequence[float] = (1,)) -> None:
        self._sizes, self._factors = np.log(sizes), factors

    def __call__(self, batch: Any) -> Any:
        return np.interp(np.log(batch), self._sizes, self._factors)

    @classmethod
    def of(
        cls, batch: np.ndarray, predicted: np.ndarray, real: np.ndarray, least: int = LEAST
    ) -> Scale:
        """The ratio of sums, of each batch size that has enough entries; without any, of all."""
        if min(predicted.sum(), real.sum()) <= 0:
            return cls()
        sizes, counts = np.unique(batch, return_counts=True)
        sums = [(s, real[batch == s].sum(), predicted[batch == s].sum()) for s in sizes.tolist()]
        found = {
            size: above / below
            for (size, above, below), count in zip(sums, counts, strict=True)
            if count >= least and min(above, below) > 0
        }
        if not found:
            return cls(factors=(real.sum() / predicted.sum(),))
        return cls(tuple(found), tuple(found.values()))


class Times:
    """What steps took, and what others would take.

    Attributes:
        ms: of each recorded step.
        costs: the cost model, as it was measured or fitted.
        measured: the cost model is the machine's; False: it was fitted to the recorded steps.
        off: median of |predicted / recorded - 1| over the decoding steps.
        step_scale, draft_scale, reading_scale: what predicted steps are multiplied with, drafting
            left out, what drafting is, and steps that read texts.
        error: of the cost model as it was measured, likewise; ``off`` where it was fitted to them.
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
        self._packs = recording.about["machine"][2] == "cpu"
        step = trees.step[: trees.real]
        drafted = trees.drafted[: trees.real].astype(np.int64)
        most = np.zeros(steps, np.int64)
        np.maximum.at(most, step, drafted)
        drafts = np.bincount(step, drafted, steps).astype(np.int64)
        sizes = zip(self.batch.tolist(), most.tolist(), drafts.tolist(), strict=True)
        self.nodes: np.ndarray = np.array([self._width(*of) for of in sizes])
        roots = np.bincount(step, c["row.root"], steps)
        self.context = roots / np.maximum(self.batch, 1)
        kind = c["step.kind"]
        usual = np.flatnonzero((kind != FIRST) & (kind != CATCHING_UP) & (self.ms > draft))
        if not len(usual):
            usual = np.flatnonzero((kind != FIRST) & (self.ms > draft))
        self.measured = costs is not None
        self.costs = costs if costs is not None else self._fitted(usual, draft)
        self.off = 0.0
        self.step_scale = self.draft_scale = Scale()
        if len(usual):
            step_ms, draft_ms = np.array([self._parts(int(s)) for s in usual]).T
            batch = self.batch[usual]
            self.step_scale = Scale.of(batch, step_ms, (self.ms - draft)[usual])
            self.draft_scale = Scale.of(batch, draft_ms, draft[usual])
            predicted = step_ms * self.step_scale(batch) + draft_ms * self.draft_scale(batch)
            self.off = float(np.median(np.abs(predicted / self.ms[usual] - 1)))
        firsts = np.flatnonzero(kind == FIRST)
        read = [self._reading(int(self.batch[s]), self.context[s] + 1) for s in firsts]
        self.reading_scale = Scale.of(self.batch[firsts], np.array(read), self.ms[firsts], 1)
        self.error = self.costs.step.error if self.measured else self.off

    def _parts(self, step: int) -> tuple[float, float]:
        batch, nodes = int(self.batch[step]), float(self.nodes[step])
        ms = self.costs.verify_ms(batch, nodes, self.context[step])
        return ms, self._drafting(batch, nodes, int(self.levels[step]))

    def width(self, nodes: Sequence[int]) -> float:
        """Draft nodes that each sequence of a step is computed with, from those that each has."""
        return self._width(len(nodes), round(max(nodes)), round(sum(nodes)))

    def _width(self, size: int, most: int, drafts: int) -> float:
        return drafts / max(size, 1) if self._packs else most

    def _drafting(self, batch: int, nodes: float, levels: int) -> float:
        """Costs are measured with the most levels that so many nodes can have; each takes as much
        as the others."""
        most = min(nodes, self._most_levels)
        nothing, whole = (self.costs.draft.ms(batch, n) for n in (0, nodes))
        return nothing + (whole - nothing) * min(levels / most, 1.0) if most > 0 else whole

    def _fitted(self, usual: np.ndarray, draft: np.ndarray) -> CostModel:
        """From medians of steps of one batch, tree and context, in steps of 64 tokens."""
        if not len(usual):
            return CostModel(StepCosts((1,), (max(float(self.ms.mean()), 1e-3),)))
        alike: dict[tuple[int, int, int], list[int]] = {}
        for s in usual.tolist():
            context = int(self.context[s]) // 64 * 64 + 32
            alike.setdefault((int(self.batch[s]), round(float(self.nodes[s])), context), []).append(
                s
            )
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

    def predicted(
        self, batch: int, levels: int, nodes: float, context: float, drafted: float | None = None
    ) -> tuple[float, float]:
        """A step of any size, and what of it is drafting.

        Args:
            nodes: that are verified for each sequence.
            drafted: of how many they were chosen; None: they are all.
        """
        step = self.costs.verify_ms(batch, nodes, context) * self.step_scale(batch)
        drafting = self._drafting(batch, nodes if drafted is None else drafted, levels)
        drafting *= self.draft_scale(batch)
        return float(step + drafting), float(drafting)

    def reading(self, batch: int, tokens: float) -> float:
        """The step that reads a batch of texts, of ``tokens`` each, up to their first tokens."""
        return float(self._reading(batch, tokens) * self.reading_scale(batch))

    def _reading(self, batch: int, tokens: float) -> float:
        """As of one step with so many rows, each of which sees half of its text in the mean."""
        return self.costs.reading_ms(batch, round(batch * tokens), tokens / 2)

    def drafter_reading(self, tokens: int) -> float:
        """What a draft model takes to read so many tokens before it drafts."""
        sizes, times = zip(*self.costs.draft.reading or ((0, 0.0),), strict=True)
        return float(np.interp(tokens, sizes, times))

    def changed(
        self, step: int, levels: int, nodes: float, drafted: float | None = None
    ) -> tuple[float, float]:
        """A recorded step, had it been another one, see `predicted`; what of it is drafting."""
        batch, context = int(self.batch[step]), float(self.context[step])
        was, ms = float(self.nodes[step]), float(self.ms[step])
        before, _ = self.predicted(batch, int(self.levels[step]), was, context)
        after, drafting = self.predicted(batch, levels, nodes, context, drafted)
        alike = min(levels, nodes) == min(self.levels[step], was) and nodes == was
        same = alike and drafted in (None, nodes)
        scale = ms / before if before > 0 else 0.0
        return (ms if same or before <= 0 else after * scale), drafting * scale
