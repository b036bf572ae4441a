"""What a controller decided, and what came of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from inferlab.specdec.control import StepObservation


class Report:
    """What was decided, and what came of it."""

    def __init__(self) -> None:
        self._steps: Counter[int] = Counter()  # by nodes for each sequence
        self._spent = self._plain = 0.0  # ms of all steps, and of plain ones for as many tokens
        self._largest = 0

    def count(self, step: StepObservation, plain_ms: float) -> None:
        self._steps[step.budget.nodes] += 1
        self._spent += step.step_ms
        self._plain += plain_ms
        self._largest = max(self._largest, step.batch_size)

    def describe(self, promised: float) -> dict[str, Any]:
        """``promised``: the speedup that was predicted last."""
        total = self._steps.total()
        drafted = total - self._steps[0]
        gain = self._plain / self._spent if self._spent else 1.0
        if not total:
            verdict = "no step was decoded"
        elif drafted * 2 < total:
            verdict = (
                f"drafting did not pay at batch {self._largest}: {promised:.2f} x predicted; "
                f"{total - drafted} of {total} steps decoded plainly"
            )
        else:
            verdict = f"drafted in {drafted} of {total} steps: {gain:.2f} x plain decoding"
        return {
            "steps_by_nodes": {str(nodes): n for nodes, n in sorted(self._steps.items()) if n},
            "predicted_speedup": round(promised, 3),
            "speedup": round(gain, 3),
            "verdict": verdict,
        }
