"""Reading a verifier's own probabilities off its outcomes and the noise that they came from.

Samples tell a probability to 1/sqrt(n). But the noise is public: with the acceptance uniforms u of
n seeds at hand, an acceptance "u < t" shows between which two of them t lies; and with the Gumbel
noise g at hand, an arg-max of log r + g shows between which differences of noise each
log r_i - log r_j lies. So n outcomes tell a probability to about 1/n, with no chance of error: what
comes out is an interval that follows from the outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from inferlab.kernels.noise import gumbel_row

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Inconsistent(Exception):
    """Outcomes that do not come from the noise which they should come from, whatever the rule."""


class Law:
    """Probabilities that are known to lie in intervals.

    Attributes:
        low, high: f64[V].
    """

    def __init__(self, low: Floats, high: Floats) -> None:
        self.low, self.high = low, high

    @property
    def middle(self) -> Floats:
        """f64[V]: of the intervals, made to sum to 1."""
        middle = (self.low + self.high) / 2
        return np.asarray(middle / middle.sum())

    @property
    def width(self) -> float:
        """Of the widest interval."""
        return float((self.high - self.low).max())

    def excess(self, p: Floats) -> float:
        """How far ``p`` lies outside, at most over the tokens; 0 inside."""
        return float(np.maximum(np.maximum(self.low - p, p - self.high), 0.0).max())


@lru_cache(maxsize=16)
def gumbels(seeds: int, position: int, width: int, purpose: int) -> Floats:
    """f64[seeds, width]: noise of seeds 0, 1, ... at a position."""
    rows = [gumbel_row(seed, position, width, purpose).numpy() for seed in range(seeds)]
    return np.stack(rows).astype(np.float64)


def uniforms(seeds: int, position: int, width: int, purpose: int) -> Floats:
    """f64[seeds, width]: acceptance uniforms, which share their words with Gumbel noise
    g = -log(-log(1 - u))."""
    return np.asarray(-np.expm1(-np.exp(-gumbels(seeds, position, width, purpose))))


def read_threshold(u: Floats, accepted: NDArray[np.bool_]) -> tuple[float, float]:
    """The interval of t, where u < t was accepted and the rest was not.

    Raises:
        Inconsistent: one was refused below one that was accepted.
    """
    low = float(u[accepted].max(initial=0.0))
    high = float(u[~accepted].min(initial=1.0))
    if low > high:
        raise Inconsistent(f"refused at u = {high:.6f}, accepted at u = {low:.6f}")
    return low, high


def read_argmax(g: Floats, tokens: Ints) -> Law:
    """The law r of which tokens are arg-max of log r + g.

    From r_i = 1 / sum_j exp(log r_j - log r_i) and the interval of each difference.

    Args:
        g: f64[n, V] noise.
        tokens: i64[n], in [0, V).

    Raises:
        Inconsistent: they are no such arg-max, for any r.
    """
    width = g.shape[1]
    # least[i, j]: log r_i - log r_j is no less than this, by the outcomes in which i won.
    least = np.full((width, width), -np.inf)
    for i in range(width):
        won = g[tokens == i]
        if len(won):
            least[i] = (won - won[:, i : i + 1]).max(axis=0)
    np.fill_diagonal(least, 0.0)
    if (least > -least.T + 1e-5).any():
        i, j = (int(n) for n in np.unravel_index(int((least + least.T).argmax()), least.shape))
        raise Inconsistent(f"tokens {i} and {j} are not chosen by their noise")
    with np.errstate(over="ignore"):
        low = 1 / np.exp(-least).sum(axis=1)
        high = 1 / np.exp(least.T).sum(axis=1)
    return Law(low, high)


def combine(parts: Sequence[tuple[tuple[float, float], Law]]) -> Law:
    """The mixture of laws, each with the interval of its weight."""
    low = sum((weight[0] * law.low for weight, law in parts), np.zeros_like(parts[0][1].low))
    high = sum((weight[1] * law.high for weight, law in parts), np.zeros_like(low))
    return Law(low, np.minimum(high, 1.0))


def certain(token: int, width: int) -> Law:
    """The law of one token."""
    law = np.zeros(width)
    law[token] = 1.0
    return Law(law, law)
