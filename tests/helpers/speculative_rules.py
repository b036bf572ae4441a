"""Speculative sampling at one node, written out in Python with exact fractions, right and broken.

`outcomes` enumerates every acceptance event for given siblings, `emitted` every draft draw as well;
the rule is right if what is emitted has the target's distribution. The broken rules are mistakes
that others shipped; the checks that pass for the kernel must fail for each of them.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import scipy.stats

Distribution = list[Fraction]

BROKEN_RULES = (
    "residual_not_updated",  # siblings are all tested against the target's own p
    "recovery_from_target",  # the last token is drawn from p instead of the residual
    "duplicates_counted_twice",  # a repeated sibling gets another try without replacement
    "draft_not_updated",  # without replacement, q still holds the rejected siblings
    "always_accepted",  # the ratio test left out
)
# Which of them show with siblings drawn with replacement; the others need distinct ones.
BROKEN_WITH_REPLACEMENT = ("residual_not_updated", "recovery_from_target", "always_accepted")


def exact(values: list[float]) -> Distribution:
    """Decimal probabilities as fractions."""
    p = [Fraction(str(v)) for v in values]
    if sum(p) != 1:
        raise ValueError(f"{values} sum to {float(sum(p))}")
    return p


def norm(weights: Distribution) -> Distribution | None:
    total = sum(weights)
    return [w / total for w in weights] if total > 0 else None


def accepts(p: float | Fraction, q: float | Fraction, u: float, rule: str = "right") -> bool:
    """Whether a sibling is accepted at the uniform u in [0, 1]."""
    if rule == "zero_accepted":
        return u * q <= p  # u = 0 lets a token of probability 0 through
    return p > 0 and u * q < p


def residual(p: Distribution, q: Distribution) -> Distribution:
    """norm(max(p - q, 0)), p itself where nothing is left."""
    return norm([max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)]) or p


def outcomes(
    p: Distribution,
    q: Distribution,
    siblings: list[int],
    with_replacement: bool,
    rule: str = "right",
) -> list[Fraction]:
    """Probability of each emitted token, given the siblings drawn."""
    emitted = [Fraction(0)] * len(p)
    reached, target = Fraction(1), list(p)
    tried: set[int] = set()
    for token in siblings:
        if not with_replacement and token in tried and rule != "duplicates_counted_twice":
            continue
        tried.add(token)
        judged = p if rule == "residual_not_updated" else target
        chance = (
            min(Fraction(1), judged[token] / q[token]) if q[token] else Fraction(judged[token] > 0)
        )
        if rule == "always_accepted":
            chance = Fraction(judged[token] > 0)
        emitted[token] += reached * chance
        reached *= 1 - chance
        if reached == 0:
            return emitted
        target = residual(p if rule == "residual_not_updated" else target, q)
        if not with_replacement and rule != "draft_not_updated":
            q = norm([w if t != token else Fraction(0) for t, w in enumerate(q)]) or q
    last = p if rule == "recovery_from_target" else target
    return [e + reached * t for e, t in zip(emitted, last, strict=True)]


def draws(
    q: Distribution, count: int, with_replacement: bool, duplicated: bool = False
) -> list[tuple[list[int], Fraction]]:
    """Every list of siblings with its probability. `duplicated`: each is listed twice."""
    out = []
    for siblings in product(range(len(q)), repeat=count):
        chance, left = Fraction(1), list(q)
        for token in siblings:
            chance *= left[token]
            if not with_replacement:
                left[token] = Fraction(0)
                left = norm(left) or left
        if chance > 0:
            listed = [t for t in siblings for _ in range(2)] if duplicated else list(siblings)
            out.append((listed, chance))
    return out


def emitted(
    p: Distribution,
    q: Distribution,
    count: int,
    with_replacement: bool,
    rule: str = "right",
    duplicated: bool = False,
) -> Distribution:
    """The exact distribution of the emitted token over all draft draws and acceptance outcomes."""
    total = [Fraction(0)] * len(p)
    for siblings, chance in draws(q, count, with_replacement, duplicated):
        for t, value in enumerate(outcomes(p, q, siblings, with_replacement, rule)):
            total[t] += chance * value
    return total


def assert_exact(distribution: Distribution, target: Distribution) -> None:
    """The check of the enumeration."""
    if distribution != target:
        raise AssertionError(
            f"emitted {[float(v) for v in distribution]}, wanted {[float(v) for v in target]}"
        )


def assert_follows(counts: np.ndarray, target: np.ndarray) -> None:
    """The check of samples: chi-square at p > 1e-5, and nothing where the target is 0."""
    target = np.asarray(target, dtype=np.float64).ravel()
    counts = np.asarray(counts).ravel()
    if counts[target == 0].any():
        raise AssertionError(f"tokens of probability 0 came out: {counts} for {target}")
    support = target > 0
    if support.sum() < 2:
        return
    expected = target[support] / target.sum() * counts.sum()
    p_value = scipy.stats.chisquare(counts[support], expected).pvalue
    if not p_value > 1e-5:
        raise AssertionError(f"chi-square p = {p_value:.2g}: {counts / counts.sum()} for {target}")
