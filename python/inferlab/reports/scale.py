"""Axes of plots: where their marks are, and where a value lies between the ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

MARKS = 5


def nice_marks(low: float, high: float, most: int = MARKS) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that span ``low`` to ``high``."""
    spread = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / most))
    step = next(power * k for k in (1, 2, 5, 10) if power * k * most >= spread * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def log_marks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that span ``low`` (above 0) to ``high``; powers alone where
    these were many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= 2 else (1,)
    marks = [k * 10.0**power for power in range(first, last + 1) for k in digits]
    start = max((mark for mark in marks if mark <= low * (1 + 1e-9)), default=marks[0])
    stop = min((mark for mark in marks if mark >= high * (1 - 1e-9)), default=marks[-1])
    kept = [mark for mark in marks if start <= mark <= stop]
    return kept if len(kept) > 1 else [start, start * 10]


class Axis:
    """Maps values to [0, 1].

    Args:
        values: that must lie on it; those of a logarithmic one are above 0.
        zero: it begins at 0, where no value is below.
        log: by the logarithm.
    """

    def __init__(self, values: Iterable[float], *, zero: bool = True, log: bool = False) -> None:
        found = list(values) or [0.0, 1.0]
        low, high = min(found), max(found)
        if log:
            self.marks = log_marks(low, high)
        else:
            self.marks = nice_marks(min(low, 0.0) if zero else low, high)
        self._of: Callable[[float], float] = math.log if log else float
        self._low, self._high = self._of(self.marks[0]), self._of(self.marks[-1])

    def place(self, value: float) -> float:
        """0 at the first mark, 1 at the last."""
        return (self._of(value) - self._low) / (self._high - self._low)


def mark_text(value: float) -> str:
    """A mark's value, as short as it is exact; thousands as k, millions as M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}"
