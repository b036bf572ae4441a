"""How many steps a batch has to go, and what tokens are worth: it ends with its last sequence.

Where nobody waits for its place, a sequence that ends early saves its own share of the steps to
come only; how many there are, is up to the sequence that is the last. A sequence that has r tokens
to go and gains g of them in a step beyond the plain one needs n = r / (1 + g) steps, more or less:
texts differ in how much of their drafts is accepted, and so do the steps of one text. With `own` of
a step's time what it takes for single sequences,

    steps to go = own mean(n) + (1 - own) E[max n],    E[max n] = T ln(sum exp(n / T))

which has the mean of the largest of B equal normal numbers within a tenth for B from 2 to 32 if T
is ``SOFT`` of their deviation. The slope of E[max n] tells who is likely to be the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SOFT = 0.7
TEXTS = 0.3  # deviation of what texts gain, relative to the mean: measured 0.22 to 0.5
STEPS = 0.65  # and of what the steps of a text gain
AHEAD = 3.0  # tokens that a step brings one sequence more than others, to count so much less


class Course(NamedTuple):
    """How a batch goes on, for some ways to draft.

    Attributes:
        steps: to its end, of each way.
        pull: [B, ways] what a token of each sequence is worth, relative to one for all.
    """

    steps: np.ndarray
    pull: np.ndarray


def course(
    remaining: Sequence[int], gained: np.ndarray, known: Sequence[float], own: float
) -> Course:
    """To the end of a batch.

    Args:
        remaining: tokens of each sequence that are still to come.
        gained: [B, ways] tokens that a step brings each beyond the plain one; 0: it goes plainly.
        known: of each sequence, in [0, 1], how far it is known what it gains.
        own: in [0, 1]; 1 where each token counts alike.
    """
    left = np.array(remaining, dtype=np.float64)[:, None]
    steps = np.maximum(left / (1 + gained), 1.0)
    mean = steps.mean(axis=0)
    if own == 1:
        return Course(mean, np.ones_like(steps))
    texts = TEXTS**2 * (1 - np.array(known)[:, None])
    deviation = (steps * gained / (1 + gained) * np.sqrt(texts + STEPS**2 / steps)).mean(axis=0)
    soft = np.maximum(SOFT * deviation, 1e-3)
    most = steps.max(axis=0)
    behind = np.exp((steps - most) / soft)
    all_behind = behind.sum(axis=0)
    last = most + soft * np.log(all_behind)
    pull = own + (1 - own) * len(remaining) * behind / all_behind
    return Course(own * mean + (1 - own) * last, pull)


def lead(levels: int, gained: float) -> np.ndarray:
    """What a token is worth to the others where it is the n-th that a step brings a sequence, n
    from 0 on, and the sequences gain ``gained`` on average: the further ahead, the less."""
    ahead: np.ndarray = np.exp((gained - np.arange(levels + 1)) / AHEAD)
    return ahead
