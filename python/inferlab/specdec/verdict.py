"""What a controller decided, and what came of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

PAID = 1.02
"""From this speed-up on drafts are said to have paid, however few steps had some."""


class Report:
    """What was decided, and what came of it."""

    def __init__(self) -> None:
        self._steps: Counter[tuple[int, int]] = Counter()  # by nodes for each of so many sequences
        self._spent = self._plain = 0.0  # ms of all steps, and of plain ones for as many tokens

    def count(
        self, nodes: int, batch_size: int, ms: float, plain_ms: float, steps: int = 1
    ) -> None:
        """Steps that took so long, and plain ones for as many tokens.

        Args:
            nodes: that were verified for each sequence, in the mean, rounded up.
        """
        self._steps[nodes, batch_size] += steps
        self._spent += ms
        self._plain += plain_ms

    def since(self, before: Report | None = None) -> Report:
        """What came after a report was as it was ``before``; None: all, as it is now."""
        after = Report()
        after._steps.update(self._steps)
        after._spent, after._plain = self._spent, self._plain
        if before is not None:
            after._steps.subtract(before._steps)
            after._spent -= before._spent
            after._plain -= before._plain
        return after

    def describe(self, promised: float, *, drafts: bool = True) -> dict[str, Any]:
        """``promised``: the speedup that was predicted last; ``drafts``: there was who drafts."""
        by_nodes: Counter[int] = Counter()
        for (nodes, _), steps in self._steps.items():
            by_nodes[nodes] += steps
        total = by_nodes.total()
        drafted = total - by_nodes[0]
        gain = self._plain / self._spent if self._spent else 1.0
        if not total:
            verdict = "no step was decoded"
        elif not drafts:
            verdict = f"nobody drafts: {total} steps decoded plainly"
        elif drafted * 2 < total and promised > 1:
            verdict = (
                f"drafted in {drafted} of {total} steps: {promised:.2f} x is predicted, which was "
                f"not certain enough before; {gain:.2f} x plain decoding"
            )
        elif drafted * 2 < total and gain < PAID:
            largest = max(size for (_, size), steps in self._steps.items() if steps)
            verdict = (
                f"drafting did not pay at batch {largest}: {promised:.2f} x predicted; "
                f"{total - drafted} of {total} steps decoded plainly"
            )
        else:
            verdict = f"drafted in {drafted} of {total} steps: {gain:.2f} x plain decoding"
        return {
            "steps_by_nodes": {str(nodes): n for nodes, n in sorted(by_nodes.items()) if n},
            "predicted_speedup": round(promised, 3),
            "speedup": round(gain, 3),
            "verdict": verdict,
        }
