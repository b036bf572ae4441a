"""How far a sample is from a distribution that is known, and how sure that is."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

FALSE_ALARM = 1e-6
"""The chance that a certificate of what is exact fails, over all its statistical tests together."""
CONFIDENCE = 0.99
"""Of intervals and bounds, each by itself."""
RESAMPLES = 1000

_LEAST_EXPECTED = 10.0

Interval = tuple[float, float]


class PearsonTest(NamedTuple):
    """Attributes:
    p_value: the chance of a sample this far off, or further, if the distribution is as stated.
    statistic: sum of (seen - expected)^2 / expected over the cells.
    cells: those with an expected count below 10 were put together, as one.
    """

    p_value: float
    statistic: float
    cells: int


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """sum |p - q| / 2: the largest difference of the probabilities of any event."""
    return float(np.abs(np.asarray(p, float) - np.asarray(q, float)).sum() / 2)


def divergence(p: ArrayLike, q: ArrayLike) -> float:
    """KL(p, q) = sum p log(p / q) in nats; infinite where p has what q has not."""
    one, other = np.asarray(p, float), np.asarray(q, float)
    some = one > 0
    if (other[some] <= 0).any():
        return math.inf
    return float(np.sum(one[some] * np.log(one[some] / other[some])))


def tv_interval(counts: ArrayLike, target: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Holds the total variation between what was sampled from and ``target``.

    With the empirical distribution e of n samples from s over V cells, and T = TV(e, target):

    * one sample moves T by 1/n at most, so P(|T - E T| > sqrt(log(2 / a) / 2n)) <= a (McDiarmid,
      "On the method of bounded differences", 1989);
    * TV(s, target) <= E T, as TV is convex and E e = s;
    * E T <= TV(s, target) + E TV(e, s) <= TV(s, target) + sqrt((V - 1) / n) / 2 (Jensen; the
      expectation behind the bounds of Weissman et al., "Inequalities for the L1 deviation of the
      empirical distribution", 2003).

    The upper bound does not depend on V. No samples say nothing: (0, 1).

    Args:
        counts: [V] samples in each cell.
        target: [V] probabilities.
    """
    seen = np.asarray(counts, float)
    n = seen.sum()
    if n == 0:
        return 0.0, 1.0
    distance = total_variation(seen / n, target)
    spread = math.sqrt(math.log(2 / (1 - confidence)) / (2 * n))
    bias = math.sqrt((len(seen) - 1) / n) / 2
    return max(float(distance - bias - spread), 0.0), min(float(distance + spread), 1.0)


def kl_interval(
    counts: ArrayLike, target: ArrayLike, confidence: float = CONFIDENCE, *, seed: int = 0
) -> tuple[float, Interval]:
    """KL(s, target) of what was sampled from, estimated, with a bootstrap interval.

    The plug-in estimate is too large by (cells - 1) / 2n to first order (Miller, "Note on the bias
    of information estimates", 1955), which is taken off: of the sample for the target's cells, of
    resamples for those that were seen, too. Infinite where something was seen that cannot come.

    Args:
        counts: [V] samples in each cell.
        target: [V] probabilities.
    """
    seen, expected = np.asarray(counts, float), np.asarray(target, float)
    n = seen.sum()
    if n == 0 or (seen[expected <= 0] > 0).any():
        return math.inf, (0.0, math.inf)
    bias = (np.count_nonzero(expected) - 1) / (2 * n)
    again = bias + (np.count_nonzero(seen) - 1) / (2 * n)
    estimate = max(divergence(seen / n, expected) - bias, 0.0)
    drawn = np.random.default_rng(seed).multinomial(int(n), seen / n, size=RESAMPLES)
    values = [max(divergence(row / n, expected) - again, 0.0) for row in drawn]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    estimate = float(estimate)
    return estimate, (min(float(low), estimate), max(float(high), estimate))


def pearson(counts: ArrayLike, target: ArrayLike) -> PearsonTest:
    """Pearson's chi-square test ("On the criterion ...", 1900) that counts come from ``target``.

    The p-value is that of the limit for many samples. A sample where the target has nothing gives
    0: that cannot happen.

    Args:
        counts: [V] samples in each cell.
        target: [V] probabilities.
    """
    seen = np.asarray(counts, float)
    share = np.asarray(target, float)
    expected = share / share.sum() * seen.sum()
    if (seen[share <= 0] > 0).any():
        return PearsonTest(0.0, math.inf, int((share > 0).sum()))
    some = share > 0
    seen, expected = _pooled(seen[some], expected[some])
    freedom = len(seen) - 1
    if freedom < 1:
        return PearsonTest(1.0, 0.0, len(seen))
    statistic = float(((seen - expected) ** 2 / expected).sum())
    # The chi-square distribution's upper tail is the regularised upper incomplete gamma function.
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return PearsonTest(float(torch.special.gammaincc(halves[0], halves[1])), statistic, len(seen))


def _pooled(
    seen: NDArray[np.float64], expected: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cells of which too little is expected as one, which takes the smallest other one where it is
    too small still."""
    order = np.argsort(expected)
    seen, expected = seen[order], expected[order]
    small = int((expected < _LEAST_EXPECTED).sum())
    if 0 < small < len(seen) and expected[:small].sum() < _LEAST_EXPECTED:
        small += 1
    if small < 2:
        return seen, expected
    return (
        np.concatenate([[seen[:small].sum()], seen[small:]]),
        np.concatenate([[expected[:small].sum()], expected[small:]]),
    )


def share_interval(hits: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Of a share: Wilson's score interval ("Probable inference", 1927); (0, 1) of nothing."""
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = hits / total
    scale = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(middle - half, 0.0), min(middle + half, 1.0)
