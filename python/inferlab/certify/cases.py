"""Small vocabularies on which verification can be enumerated; each is awkward in its own way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inferlab.kernels import SamplingTensors
from inferlab.kernels.reference.sampling import filtered, penalised_logits, probabilities

Floats = NDArray[np.float64]
Siblings = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One node with children: whose law is known, and what they were drawn from.

    Attributes:
        target: p over the vocabulary, before the sampler.
        draft: q likewise; None: children are not drawn, whatever they are must do no harm.
        siblings: how many.
        with_replacement: whether they are drawn independently of each other.
        twice: each of them is listed twice, as a drafter that does not look may do.
        sampler: temperature (1) and filters.
    """

    name: str
    target: tuple[float, ...]
    draft: tuple[float, ...] | None
    siblings: int = 1
    with_replacement: bool = False
    twice: bool = False
    sampler: dict[str, Any] = field(default_factory=dict)

    def sampling(self, seeds: Sequence[int]) -> SamplingTensors:
        """The sampler for each of the seeds."""
        return SamplingTensors.of(
            len(seeds), **{"temperature": 1.0, **self.sampler}, seed=list(seeds)
        )

    def law(self) -> Floats:
        """f64[V]: what has to come out, p after the sampler."""
        return sampled_law(logits_of(self.target), self.sampling([0]))

    def draws(self) -> Iterator[tuple[Siblings, float]]:
        """Every list of children with its probability; of those that are not drawn each counts by
        itself, and has 1."""
        size = len(self.target)
        if self.draft is None:
            for drawn in product(range(size), repeat=self.siblings):
                if self.twice or len(set(drawn)) == self.siblings:
                    yield drawn, 1.0
            return
        q = sampled_law(logits_of(self.draft), self.sampling([0]))
        for drawn in product(range(size), repeat=self.siblings):
            chance, left = 1.0, q.copy()
            for token in drawn:
                chance *= left[token]
                if not self.with_replacement:
                    left[token] = 0.0
                    left = left / left.sum() if left.sum() > 0 else left
            if chance > 0:
                yield tuple(t for t in drawn for _ in range(1 + self.twice)), chance


def logits_of(p: Sequence[float]) -> torch.Tensor:
    """f32[V]: log p; -inf where it is 0."""
    return torch.log(torch.tensor(p, dtype=torch.float64)).float()


def sampled_law(logits: torch.Tensor, sampling: SamplingTensors) -> Floats:
    """f64[V]: the distribution that a sampler (its first entry) draws from, by its definition.

    From the oracle: what is claimed of kernels is not to be computed by them.
    """
    row = penalised_logits(logits.cpu(), sampling, 0)
    assert row is not None
    keep = filtered(row, sampling, 0)
    return np.asarray(probabilities(row, keep, float(sampling.temperature[0])).double().numpy())


SPECINFER = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)
"""Two siblings without the residual's update give (.35, .39, .26)."""
VLLM = (0.1, 0.6, 0.3), (0.5, 0.3, 0.2)
"""Noise shared by draft and recovery gives about 10.2, 63.0 and 26.8 % (vLLM #47386, #54282)."""
FOUR = (0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4)

CASES = (
    Case("one draft", *SPECINFER),
    Case("one draft, more likely than its target", *VLLM),
    Case("two siblings", *SPECINFER, siblings=2),
    Case("two siblings, drawn independently", *SPECINFER, siblings=2, with_replacement=True),
    Case("three siblings of four tokens", *FOUR, siblings=3),
    Case("siblings listed twice", *FOUR, siblings=2, twice=True),
    Case("a draft that the target never chooses", (0.0, 0.7, 0.3), (0.6, 0.2, 0.2)),
    Case("an unlikely draft that the target never chooses", (0.0, 0.7, 0.3), (1e-44, 0.5, 0.5)),
    Case("draft and target are equal", (0.5, 0.3, 0.2), (0.5, 0.3, 0.2), siblings=2),
    Case("draft and target have nothing in common", (0.5, 0.5, 0, 0), (0, 0, 0.5, 0.5), siblings=2),
    Case("a target of one token", (0, 1, 0), (0.2, 0.5, 0.3), siblings=2),
    Case("children that were not drawn", (0.15, 0.5, 0.25, 0.1), None, siblings=2),
    Case("temperature 0.7", *FOUR, siblings=2, sampler={"temperature": 0.7}),
    Case("top-k 3", *FOUR, siblings=2, sampler={"top_k": 3}),
    Case("top-p 0.75", *FOUR, siblings=2, sampler={"top_p": 0.75}),
    Case("min-p 0.6", *FOUR, siblings=2, sampler={"min_p": 0.6}),
)
