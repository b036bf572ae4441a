"""How often nodes are accepted by their rank, whatever else is known of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Ranks:
    """Shares of sequences in which the node of each rank was verified, and accepted.

    Args:
        nodes: of the largest tree, below the root.
        priors: of each rank, the chance before anything was seen; what is missing is assumed.
        evidence: sequences that these are worth, 0 where they were not measured.
    """

    HOPE, UNKNOWN = 0.7, 0.9  # chance of the first node, and of the next relative to the one before
    FORGET = 0.98  # weight of what was known, per step
    WEIGHT = 2.0  # of a rank's prior at least, in sequences

    def __init__(self, nodes: int, priors: Sequence[float], evidence: float = 0.0) -> None:
        chances = list(priors[:nodes])
        while len(chances) < nodes:
            chances.append(chances[-1] * self.UNKNOWN if chances else self.HOPE)
        self._priors = np.array(chances)
        self._weight = max(self.WEIGHT, evidence)
        self._seen = np.zeros((3, nodes))
        self._accepted, self._verified, self._offered = self._seen
        self._sums: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes accepted, and verified, of the first n ranks, n from 0 on: per sequence."""
        if self._sums is None:
            chances, chance, prior = [0.0], 0.0, 0.0
            for own, accepted, offered in zip(
                self._priors.tolist(), self._accepted.tolist(), self._offered.tolist(), strict=True
            ):
                # What was never tried is as likely, relative to the one before, as it was said.
                expected = own if len(chances) == 1 else chance * own / prior
                prior = max(own, 1e-9)
                chance = (accepted + self._weight * expected) / (offered + self._weight)
                chances.append(chance)
            verified = (self._verified + self.WEIGHT) / (self._offered + self.WEIGHT)
            self._sums = np.cumsum(chances), np.cumsum([0.0, *verified])
        return self._sums

    @property
    def chances(self) -> list[float]:
        """Of each rank."""
        chances: list[float] = np.diff(self.sums[0]).tolist()
        return chances

    def learn(
        self,
        nodes: int,
        accepted: Sequence[Sequence[int]],
        kept: Sequence[int] | None,
        news: Sequence[float] | None = None,
    ) -> None:
        """A step with a budget of so many nodes for each of some sequences.

        Args:
            accepted: of each, the ranks that were.
            kept: how many were verified; None: all.
            news: what each tells of the others, in [0, 1]; None: 1.
        """
        # A node that the drafter did not offer (no n-gram found, say) counts as not accepted.
        news = news or [1.0] * len(accepted)
        self._seen[:, :nodes] *= self.FORGET ** (sum(news) / max(len(news), 1))
        self._offered[:nodes] += sum(news)
        for ranks, weight in zip(accepted, news, strict=True):
            for rank in ranks:
                if rank <= nodes:
                    self._accepted[rank - 1] += weight
        for count, weight in zip(kept or [nodes] * len(news), news, strict=True):
            self._verified[:count] += weight
        self._sums = None


class Onward:
    """What the next level of a chain is to be expected to bring, relative to the one before: told
    from the levels that drafts went on to."""

    FORGET, HOPE, WEIGHT = 0.99, 0.8, 4.0

    def __init__(self) -> None:
        self._before = self._there = 0.0

    @property
    def share(self) -> float:
        return (self._there + self.WEIGHT * self.HOPE) / (self._before + self.WEIGHT)

    def observe(self, before: float, there: float) -> None:
        """Tokens to be expected of two successive levels."""
        self._before = self.FORGET * self._before + before
        self._there = self.FORGET * self._there + there
