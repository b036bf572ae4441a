"""What tokens are worth where a batch ends with its last sequence.

Where nobody waits for its place, a sequence that ends early saves its own share of the steps to
come only; how many there are, is up to the sequences that are behind. Who is behind counts by
exp(remaining / ``BEHIND``). Plain steps to the end of the batch are taken to be

    V = own mean(remaining) + (1 - own) BEHIND ln(sum exp(remaining / BEHIND))

with `own` of a step's time what it takes for single sequences. A token's worth is the slope of V,
what a step brings is its difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SPREAD = 0.3
BEHIND = 6.0  # tokens by which a sequence is behind others that matter less
AHEAD = 3.0  # tokens that a step brings one sequence more than others, to count so much less


def worth(remaining: Sequence[int], own: float) -> list[float]:
    """Of a token of each sequence, relative to one for all of them.

    Args:
        remaining: tokens of each that are still to come.
        own: in [0, 1]; 1 where each token counts alike.
    """
    if own == 1:
        return [1.0] * len(remaining)
    most = max(remaining)
    behind = [math.exp((n - most) / BEHIND) for n in remaining]
    scale = (1 - own) * len(remaining) / sum(behind)
    return [own + scale * value for value in behind]


def lead(levels: int, gained: float) -> list[float]:
    """What a token is worth to the others where it is the n-th that a step brings a sequence, n
    from 0 on, and the sequences gain ``gained`` on average: the further ahead, the less."""
    return [math.exp((gained - n) / AHEAD) for n in range(levels + 1)]


def progress(remaining: Sequence[int], gained: Sequence[int], own: float) -> float:
    """How many plain steps would have brought the batch as near to its end as one that gained so
    many tokens of each sequence. Arguments as for `worth`."""
    mean = sum(gained) / len(gained)
    if own == 1:
        return mean
    most = max(remaining)
    now = after = 0.0
    for n, more in zip(remaining, gained, strict=True):
        now += math.exp((n - most) / BEHIND)
        after += math.exp((max(n - more, 0) - most) / BEHIND)
    return own * mean + (1 - own) * BEHIND * math.log(now / after)


def shared_gain(gained: np.ndarray, size: int, remaining: int) -> np.ndarray:
    """Of what steps bring each sequence on average, what they bring the slowest of all.

    Sums of random gains spread: after n steps the slowest of B sequences is behind the mean by
    z(B) sqrt(n) standard deviations of one step, with z(B) the mean of the largest of B normal
    numbers, and gains g that are geometric have a variance of g (1 + g).

    Args:
        gained: tokens beyond the plain one, of each of some budgets.
        remaining: tokens still to come.
    """
    if size == 1:
        return gained
    spread = SPREAD * math.log2(size) ** 0.8  # z(B), within 3 % from 2 to 64
    steps = np.maximum(remaining / (1 + gained), 1.0)
    found: np.ndarray = np.maximum(gained - spread * np.sqrt(gained * (1 + gained) / steps), 0.0)
    return found


def expected_progress(
    remaining: Sequence[int], members: Sequence[int], gained: np.ndarray, own: float
) -> np.ndarray:
    """`progress` of steps that bring each of ``members``, by place, so many tokens beyond the plain
    one, and the others none: of each of ``gained``."""
    size = len(remaining)
    mean = 1 + len(members) / size * gained
    if own == 1:
        return mean
    shared = shared_gain(gained, len(members), max(remaining)) if members else gained
    left = np.array(remaining, dtype=np.float64)
    most = left.max()
    here = np.zeros(size)
    here[list(members)] = 1.0
    after = np.maximum(left - 1 - shared[:, None] * here, 0.0) - most
    ratio = np.exp((left - most) / BEHIND).sum() / np.exp(after / BEHIND).sum(axis=1)
    found: np.ndarray = own * mean + (1 - own) * BEHIND * np.log(ratio)
    return found
