"""Chains of a draft model while a judge watches them grow."""

from __future__ import annotations

import torch

from inferlab.specdec.acceptance import kinds_of, sure_of
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge


class Watched:
    """How sure the draft is of its chains, told to a judge level by level.

    A token competes with the runner-up by the sigmoid of the gap between the scores that they were
    drawn by: at temperature 0 logits, above it with the noise that the target adds too, so that
    the gap says whether the token wins under that noise. A path is as sure as the product along it.

    Args:
        judge: hears of it.
        batch: whose chains they are.
    """

    def __init__(self, judge: Judge, batch: Batch) -> None:
        self._judge = judge
        self._requests = [request.request_id for request in batch.requests]
        self._sure = [1.0] * len(batch)
        self._kinds: list[list[int]] = []  # by level

    def goes_on(self, scores: torch.Tensor) -> bool:
        """Takes the scores [R, 1, 2] of a level's two best tokens; whether to draft another one."""
        self._sure = [
            sure * sure_of(best, second)
            for sure, ((best, second),) in zip(self._sure, scores.tolist(), strict=True)
        ]
        self._kinds.append(kinds_of(self._sure))
        return self._judge.goes_on(self._requests, self._kinds[-1])

    def counts(self) -> list[int]:
        """How many tokens of each chain are to be verified."""
        chains = [list(chain) for chain in zip(*self._kinds, strict=True)]
        return self._judge.keep(self._requests, chains)
