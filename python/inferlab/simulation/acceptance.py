"""How many tokens a step gives to a text, by how much is drafted: from chances, or as recorded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from inferlab.config_types import MAX_TREE_NODES
from inferlab.errors import UsageError
from inferlab.specdec.cuts import Rule, Trees
from inferlab.specdec.recorded import Recording

TRACES = 2048
"""Texts that are made up."""
MADE_UP = 1024
"""Tokens of each; longer ones begin again at their first."""


class Acceptance(ABC):
    """Traces: of each text, and of each number of new tokens that it may have, how many tokens a
    step then gives. Requests take them by their ``trace``, modulo how many there are."""

    def __init__(self) -> None:
        self._emitted: dict[int, np.ndarray] = {}
        self._steps: dict[int, np.ndarray] = {}

    @abstractmethod
    def _make(self, levels: int) -> np.ndarray:
        """[traces, tokens]: what a step that drafts so many levels gives."""

    @property
    @abstractmethod
    def traces(self) -> int:
        """How many there are."""

    @property
    @abstractmethod
    def most(self) -> int:
        """Levels of which something is known."""

    @abstractmethod
    def nodes(self, levels: int) -> float:
        """Draft nodes that are verified for a sequence in such a step, in the mean."""

    def emitted(self, levels: int) -> np.ndarray:
        """[traces, tokens] uint8: tokens of a step for a text that has so many new tokens, modulo
        the width."""
        if levels not in self._emitted:
            made = self._make(levels) if levels > 0 else np.ones((self.traces, self._width), int)
            self._emitted[levels] = made.astype(np.uint8)
        return self._emitted[levels]

    @property
    @abstractmethod
    def _width(self) -> int:
        """Tokens of each trace."""

    def steps(self, levels: int, longest: int) -> np.ndarray:
        """[traces, longest + 1]: decoding steps until a text has so many new tokens, the first of
        which is there before."""
        known = self._steps.get(levels)
        if known is None or known.shape[1] <= longest:
            emitted = self.emitted(levels).astype(np.int64)
            rows, width = np.arange(len(emitted)), emitted.shape[1]
            needed = np.zeros((len(emitted), longest + 1), np.int32)
            at = np.ones(len(emitted), np.int64)
            while at.min() < longest:
                going = np.flatnonzero(at < longest)
                needed[rows[going], at[going] + 1] = 1  # one more step, from here on
                at[going] += emitted[going, at[going] % width]
            known = self._steps[levels] = np.cumsum(needed, axis=1, dtype=np.int32)
        return known

    def mean(self, levels: int) -> float:
        """Tokens of a step in the mean, over whole texts."""
        steps = self.steps(levels, self._width)[:, self._width]
        return float((self._width - 1) * len(steps) / steps.sum())


class Chances(Acceptance):
    """A chance for each level, whatever the text.

    Args:
        levels: the chance that a level is accepted behind the one before; the last one counts for
            all further ones.
    """

    def __init__(self, levels: Sequence[float], seed: int = 0) -> None:
        super().__init__()
        if not levels or not all(0 <= chance <= 1 for chance in levels):
            raise UsageError("acceptance: chances must be from 0 to 1")
        self._chances = tuple(levels)
        self._drawn = np.random.default_rng(seed).random((TRACES, MADE_UP))

    @property
    def traces(self) -> int:
        return TRACES

    @property
    def most(self) -> int:
        return 64

    @property
    def _width(self) -> int:
        return MADE_UP

    def nodes(self, levels: int) -> float:
        return float(levels)

    def _make(self, levels: int) -> np.ndarray:
        chances = [self._chances[min(k, len(self._chances) - 1)] for k in range(levels)]
        emitted = np.ones(self._drawn.shape, np.int64)
        for chance in np.cumprod(chances):
            emitted += self._drawn < chance
        return emitted


class Recorded(Acceptance):
    """As it was recorded; each recorded request is a trace.

    A step that begins where none was recorded gives what one of the others gave.

    Args:
        recording: of a policy that can be replayed.
    """

    def __init__(self, recording: Recording, seed: int = 0) -> None:
        super().__init__()
        policy = recording.about["policy"]
        threshold = float(policy.get("tau", policy.get("k", 0.0)))
        self._rule = Rule(policy["policy"], threshold).check()
        self._trees = trees = Trees(recording)
        prompts = recording.columns["request.prompt"]
        self.prompts = prompts.astype(np.int64)
        self.outputs = trees.lengths
        self._at = trees.columns["row.root"] + 1 - prompts[trees.request]
        self._most = int(recording.columns["step.levels"].max(initial=0))
        self._seed = seed
        if not trees.decoding.any():
            raise UsageError("DIR: the recording has no decoding steps; record longer texts")

    @property
    def traces(self) -> int:
        return len(self.prompts)

    @property
    def most(self) -> int:
        return self._most

    @property
    def _width(self) -> int:
        return max(int(self.outputs.max()), 2)

    def nodes(self, levels: int) -> float:
        trees = self._trees
        if levels == 0:
            return 0.0
        cut = trees.cut(levels, MAX_TREE_NODES, self._rule)
        return float(cut.nodes[trees.decoding].mean())

    def _make(self, levels: int) -> np.ndarray:
        trees, random = self._trees, np.random.default_rng([self._seed, levels])
        cut = trees.cut(levels, MAX_TREE_NODES, self._rule)
        told = ~cut.empty & ~trees.first
        known = np.flatnonzero(told)
        usual = np.flatnonzero(told & trees.decoding & (trees.left > levels))
        if not len(usual):
            usual = np.flatnonzero(trees.decoding)
        given = np.where(cut.exact, cut.emitted, cut.expected)
        given = np.floor(given + random.random(len(given))).astype(np.int64)
        given = np.clip(given, 1, 255)
        made = given[random.choice(usual, (self.traces, self._width))]
        inner, real = known[known >= trees.real], known[known < trees.real]
        for rows in (inner, real):
            made[trees.request[rows], self._at[rows]] = given[rows]
        return made
