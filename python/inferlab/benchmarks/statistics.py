"""Statistics of repeated measurements: order statistics, bootstrap intervals, paired ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Maps samples [..., n] to values [...], along the last axis."""

RESAMPLES = 2000
PERMUTATIONS = 10_000
CONFIDENCE = 0.95
_NORMAL = NormalDist()


def mean(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.mean(samples, axis=-1))


def median(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.median(samples, axis=-1))


def summarize(values: ArrayLike, *, seed: int = 0) -> dict[str, Any]:
    """Describes measurements.

    Returns:
        ``mean``, ``median``, ``std`` (of the sample: divisor n - 1; 0 for one value), ``min``,
        ``max``, ``p90``, ``p99`` (linear between order statistics), ``mean_ci95`` (BCa bootstrap)
        and ``median_ci95`` (percentile bootstrap; BCa's jackknife is not valid for a median), each
        (low, high) or None for fewer than two values, and ``raw``.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    samples = _checked(values)
    p90, p99 = np.percentile(samples, [90, 99])
    return {
        "mean": float(samples.mean()),
        "median": float(np.median(samples)),
        "std": float(samples.std(ddof=1)) if len(samples) > 1 else 0.0,
        "min": float(samples.min()),
        "max": float(samples.max()),
        "p90": float(p90),
        "p99": float(p99),
        "mean_ci95": bootstrap_interval(samples, mean, method="bca", seed=seed),
        "median_ci95": bootstrap_interval(samples, median, method="percentile", seed=seed),
        "raw": samples.tolist(),
    }


def bootstrap_interval(
    values: ArrayLike,
    statistic: Statistic = mean,
    *,
    method: str = "bca",
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """A bootstrap confidence interval of a statistic (Efron and Tibshirani, 1993, ch. 13 and 14).

    Args:
        values: independent measurements [n].
        statistic: vectorised over leading axes.
        method: "percentile", or "bca" (bias-corrected and accelerated; for smooth statistics).
        resamples: drawn with replacement from numpy's PCG64(seed).

    Returns:
        (low, high), or None for fewer than two values, which say nothing about their spread.

    Raises:
        ValueError: no values, one that is not finite, or an argument that is not allowed.
    """
    samples = _checked(values)
    if method not in ("percentile", "bca"):
        raise ValueError(f"method is {method!r}; it must be percentile or bca")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; it must be between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples!r}; it must be at least 1")
    n = len(samples)
    if n < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    drawn = statistic(samples[picks])
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    if method == "bca":
        tails = _bca_tails(samples, drawn, statistic, tails)
    low, high = np.quantile(drawn, tails)
    return float(low), float(high)


def _bca_tails(
    samples: NDArray[np.float64],
    drawn: NDArray[np.float64],
    statistic: Statistic,
    tails: tuple[float, float],
) -> tuple[float, float]:
    """The quantiles to read instead of ``tails``: corrected for median bias and skewness."""
    observed = float(statistic(samples))
    below = (np.sum(drawn < observed) + 0.5 * np.sum(drawn == observed)) / len(drawn)
    if not 0.0 < below < 1.0:  # a constant, or all resamples on one side: nothing to correct by
        return tails
    bias = _NORMAL.inv_cdf(float(below))
    n = len(samples)
    left_out = statistic(np.broadcast_to(samples, (n, n))[~np.eye(n, dtype=bool)].reshape(n, n - 1))
    deviation = left_out.mean() - left_out
    spread = float(np.sum(deviation**2))
    acceleration = float(np.sum(deviation**3)) / (6 * spread**1.5) if spread > 0 else 0.0

    def corrected(tail: float) -> float:
        z = bias + _NORMAL.inv_cdf(tail)
        return _NORMAL.cdf(bias + z / (1 - acceleration * z))

    return corrected(tails[0]), corrected(tails[1])


def quantile_interval(
    values: ArrayLike,
    quantile: float,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """A percentile bootstrap interval of a quantile (linear between order statistics).

    The r-th of n values drawn with replacement is the value at rank ``ceil(n U)``, where U is the
    r-th of n uniform numbers, Beta(r, n - r + 1): the resamples are drawn from that, exactly as if
    all n values had been, in O(1) each, so that a million values are no more work than ten.

    Returns:
        (low, high), or None for fewer than two values.

    Raises:
        ValueError: no values, one that is not finite, or a quantile not between 0 and 1.
    """
    samples = np.sort(_checked(values))
    if not 0.0 < quantile < 1.0:
        raise ValueError(f"quantile is {quantile!r}; it must be between 0 and 1")
    n = len(samples)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    place = quantile * (n - 1)  # from 0, between the order statistics r and r + 1 (from 1)
    r = int(place) + 1
    lower = rng.beta(r, n - r + 1, size=resamples)
    upper = lower + (1 - lower) * rng.beta(1, max(n - r, 1), size=resamples)
    low_rank, high_rank = (np.minimum((u * n).astype(int), n - 1) for u in (lower, upper))
    weight = place - (r - 1) if r < n else 0.0
    drawn = samples[low_rank] * (1 - weight) + samples[high_rank] * weight
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def ratio_of_medians(
    numerator: Sequence[ArrayLike],
    denominator: Sequence[ArrayLike],
    *,
    paired: bool = True,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """How many times larger one measurement is than another, over prompts and iterations.

    Entry g of both arguments holds the measurements of group g (a prompt), in pairs: measurement i
    of both was taken in the same round, next to each other in time, so drift of the machine hits
    both. A group counts by its medians.

    The interval resamples what was sampled: groups (where there are several) and, within them, the
    rounds, always the pair together.

    Args:
        paired: False: only the groups are pairs. What is in them was measured at other times and is
            resampled apart; there may be more of one than of the other.

    Returns:
        ``ratio``: the median over groups of the numerator's medians, divided by that of the
        denominator's; ``ci95``: its percentile bootstrap interval, or None for a single pair;
        ``by_group``: the ratio of medians of each group.

    Raises:
        ValueError: no groups, groups of different sizes, an empty group, a value not above 0.
    """
    groups = _pairs(numerator, denominator)
    for index, pair in enumerate(groups):
        if paired and len(pair[0]) != len(pair[1]):
            raise ValueError(f"group {index} must hold pairs of numbers, equally many")
        if min(values.min() for values in pair) <= 0:
            raise ValueError(f"group {index} must hold numbers above 0")

    medians = np.array([[np.median(values) for values in pair] for pair in groups])  # [groups, 2]
    rng = np.random.default_rng(seed)
    resampled = np.empty((resamples, len(groups), 2))
    for index, pair in enumerate(groups):
        picks = rng.integers(0, len(pair[0]), size=(resamples, len(pair[0])))
        for side, values in enumerate(pair):
            if side and not paired:
                picks = rng.integers(0, len(values), size=(resamples, len(values)))
            resampled[:, index, side] = np.median(values[picks], axis=-1)
    if len(groups) > 1:
        chosen = rng.integers(0, len(groups), size=(resamples, len(groups)))
        resampled = np.take_along_axis(resampled, chosen[:, :, None], axis=1)
    over_groups = np.median(resampled, axis=1)  # [resamples, 2]
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    low, high = np.quantile(over_groups[:, 0] / over_groups[:, 1], tails)
    single = len(groups) == 1 and len(groups[0][0]) == len(groups[0][1]) == 1
    overall = np.median(medians, axis=0)
    return {
        "ratio": float(overall[0] / overall[1]),
        "ci95": None if single else (float(low), float(high)),
        "by_group": (medians[:, 0] / medians[:, 1]).tolist(),
    }


def permutation_p(
    one: Sequence[ArrayLike],
    other: Sequence[ArrayLike],
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float:
    """How often chance alone makes two measurements differ as much as these do, or more.

    Entry g of both arguments holds the measurements of group g (a prompt). Were there no
    difference, it would not matter which of a group's values are whose: they are dealt anew within
    each group. What is looked at is the sum over groups of the difference of means, on both sides
    of 0: give logarithms of what differs by factors. With one value each per group this is the
    sign-flip test of pairs; with one group it is the two-sample test.

    Returns:
        The p-value, (1 + hits) / (1 + permutations): never 0; 1 for a single pair.

    Raises:
        ValueError: no groups, groups of different sizes, an empty group, a value not finite.
    """
    rng = np.random.default_rng(seed)
    observed, dealt = 0.0, np.zeros(permutations)
    for first, second in _pairs(one, other):
        observed += float(first.mean() - second.mean())
        pool = np.concatenate([first, second])
        order = rng.random((permutations, len(pool))).argsort(axis=1)
        mixed = pool[order]
        dealt += mixed[:, : len(first)].mean(axis=1)
        dealt -= mixed[:, len(first) :].mean(axis=1)
    rounding = 1e-9 * max(abs(observed), float(np.abs(dealt).max()))
    hits = int(np.sum(np.abs(dealt) >= abs(observed) - rounding))
    return (1 + hits) / (1 + permutations)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values for many questions at once (Holm, 1979): of those below a level, the chance that any
    is so by chance is below that level."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = least
    return adjusted


def _pairs(
    one: Sequence[ArrayLike], other: Sequence[ArrayLike]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    if not one or len(one) != len(other):
        raise ValueError(
            f"there are {len(one)} groups and {len(other)}; they must be equally many, at least one"
        )
    return [(_checked(a), _checked(b)) for a, b in zip(one, other, strict=True)]


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    samples = np.asarray(values, dtype=np.float64)
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(f"values have shape {samples.shape}; they must be a list of at least one")
    if not np.isfinite(samples).all():
        raise ValueError("values must be finite; there is a NaN or an infinity among them")
    return samples
