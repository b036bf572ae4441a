"""Lengths of texts: fixed, spread, or as they were found."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from inferlab.errors import UsageError

FORMS = (
    "128, 64-256, normal:128:32 (mean and standard deviation), exp:128 (mean) or lognormal:128:0.8 "
    "(median and sigma)"
)
LONGEST = 1 << 20
"""Of a text, in tokens."""


@dataclass(frozen=True)
class Lengths:
    """Where numbers of tokens are drawn from.

    Attributes:
        kind: "fixed", "uniform", "normal", "exp", "lognormal" or "found".
        first, second: of "uniform" the bounds, both possible; of "normal" the mean and the standard
            deviation before what is below 1 becomes 1; of "exp" the mean; of "lognormal" the median
            and the sigma.
        found: numbers that are drawn with replacement.
        most: what is longer is cut.
    """

    kind: str
    first: float = 0.0
    second: float = 0.0
    found: tuple[int, ...] = ()
    most: int = LONGEST

    @classmethod
    def parse(cls, text: str, name: str = "lengths") -> Lengths:
        """From `FORMS`.

        Raises:
            UsageError: another form, or numbers that are not allowed; begins with ``name``.
        """
        kind, _, rest = text.partition(":")
        try:
            if kind == "exp":
                made = cls("exp", float(rest))
            elif kind in ("lognormal", "normal"):
                middle, _, spread = rest.partition(":")
                made = cls(kind, float(middle), float(spread))
            elif "-" in text:
                low, _, high = text.partition("-")
                made = cls("uniform", int(low), int(high))
            else:
                made = cls("fixed", int(text), int(text))
        except ValueError:
            raise UsageError(f"{name}: {text!r} is no length; give {FORMS}") from None
        allowed = 1 <= made.first <= LONGEST and 0 <= made.second <= LONGEST
        if made.kind in ("fixed", "uniform"):
            allowed = allowed and made.first <= made.second
        if not allowed:
            raise UsageError(f"{name}: {text!r} is not allowed; must be from 1 to {LONGEST}")
        return made

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """``count`` of them, each at least 1."""
        if self.kind == "found":
            drawn = random.choice(np.array(self.found), count)
        elif self.kind == "exp":
            drawn = random.geometric(1 / self.first, count)
        elif self.kind == "lognormal":
            drawn = np.rint(random.lognormal(math.log(self.first), self.second, count))
        elif self.kind == "normal":
            drawn = np.rint(random.normal(self.first, self.second, count))
        else:
            drawn = random.integers(int(self.first), int(self.second) + 1, count)
        return np.clip(drawn, 1, self.most).astype(np.int64)
