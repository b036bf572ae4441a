"""Whether drafting pays, how much of it, and at which acceptance it would: `inferlab advise`. No
torch.

A setting is a draft mode and how much it drafts. Its steps accept what the recorded ones say
(`inferlab.specdec.replay` decodes them again, cut to that much) and take what the cost model says
of a batch of any size, scaled to the recorded steps; plain decoding takes what it says of one row
for each sequence, scaled to steps that were made in turns with those. The speed-up is the ratio of
the two rates, prompts read and texts ended included.

A step that offers L levels, each of which is passed with the chance a, gives

    1 + a + a^2 + ... + a^L

tokens in the mean. That defines the acceptance a of any tree by its mean length, and the acceptance
at which drafting breaks even by the length that would just make up for the longer steps: the
length over the speed-up. Where the texts of a batch end together that is

    (T(B, 1 + n) + D(B, n)) / T(B, 1)

but for the reading of prompts, which is the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferlab.benchmarks.statistics import bootstrap_interval
from inferlab.config import MAX_TREE_NODES
from inferlab.draft_modes import DRAFT_MODES
from inferlab.specdec.replay import Replay, Replayed
from inferlab.specdec.replay_askers import Always

WORTH = 1.05
"""A speed-up below it is not worth drafting: some of a step is not in the model."""
LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
NODES = (2, 4, 8, 16, 32, 64, 128)
"""Of settings that are weighed, where the recorded drafts are that large; and those themselves."""
LIKELY = 6
"""So many of a mode's settings are replayed for a batch size."""
NORMAL_95, NORMAL_50 = 1.960, 0.674
"""Standard deviations on either side of the mean that hold 95 % and half of a normal variable."""


@dataclass(frozen=True)
class Setting:
    """A draft mode and how much it drafts in each step.

    Attributes:
        levels: K.
        nodes: of a tree, root not counted; None: a chain, or as many as the mode drafts by default.
    """

    mode: str
    levels: int
    nodes: int | None = None

    @property
    def most_nodes(self) -> int:
        """``nodes``, or all that there are."""
        return MAX_TREE_NODES if self.nodes is None else self.nodes

    @property
    def changes(self) -> dict[str, Any]:
        """The keys of SpecdecConfig that make it."""
        return {
            "draft_mode": self.mode,
            "max_draft": self.levels,
            "tree": None,
            "tree_nodes": self.nodes,
            "controller": "fixed",
        }

    def __str__(self) -> str:
        """As flags."""
        nodes = "" if self.nodes is None else f" --tree-nodes {self.nodes}"
        return f"--draft-mode {self.mode} --K {self.levels}{nodes}"


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a setting at one batch size.

    Attributes:
        speedup: tokens per second over those of plain decoding in the same engine.
        interval: of ``speedup``, 95 %.
        tokens_per_second: of the whole batch, prompts read and texts ended included.
        length, needed_length: tokens per step and sequence, the bonus token included: to be
            expected, and with which it would break even.
        acceptance, needed_acceptance: the chance to pass a level, likewise; None where no
            acceptance would be enough.
        rough: the setting was cut from larger drafts; False: it was recorded as it would run.
        exact: share of the steps that the record holds; the others are estimated from it.
    """

    setting: Setting
    batch: int
    speedup: float
    interval: tuple[float, float]
    tokens_per_second: float
    length: float
    needed_length: float
    acceptance: float
    needed_acceptance: float | None
    rough: bool
    exact: float

    @property
    def pays(self) -> bool:
        """Whether it is worth it."""
        return self.speedup >= WORTH


def acceptance_of(length: float, levels: int) -> float | None:
    """The chance a to pass a level, in [0, 1], with which a step of so many levels gives ``length``
    tokens: 1 + a + ... + a^levels = length.

    Returns:
        0 for a length up to 1, which takes no acceptance; None for one above levels + 1, which no
        acceptance gives.

    Raises:
        ValueError: levels below 1.
    """
    if levels < 1:
        raise ValueError(f"levels is {levels}; it must be at least 1")
    if length > levels + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if math.fsum(middle**level for level in range(levels + 1)) < length:
            low = middle
        else:
            high = middle
    return high if length > 1 else 0.0


def speedup_interval(
    speedup: float, steps_per_token: Sequence[float], error: float
) -> tuple[float, float]:
    """95 % around a speed-up: what is not known of acceptance and of costs.

    Args:
        steps_per_token: of independent texts (or steps), as they were drawn. Their mean is what a
            speed-up is inversely proportional to; its error is bootstrapped.
        error: of the cost model, the median of |predicted / real - 1|. A speed-up is the ratio of
            two predictions, both off by as much and taken as independent.
    """
    mean = float(np.mean(steps_per_token))
    drawn = bootstrap_interval(steps_per_token) if len(steps_per_token) > 1 else None
    few, many = drawn or (mean, mean)
    costs = NORMAL_95 * math.sqrt(2) * error / NORMAL_50
    low = math.hypot(math.log(many / mean), costs)
    high = math.hypot(math.log(mean / few), costs)
    return speedup * math.exp(-low), speedup * math.exp(high)


def settings_of(mode: str, about: Mapping[str, Any]) -> list[Setting]:
    """What a recording of a draft mode can say something of.

    Args:
        about: of the recording (`inferlab.specdec.recording.describe_tree`).
    """
    tree = about["tree"]
    most = min(tree["levels"], about["K"])
    levels = [*(n for n in LEVELS if n < most), most] if most else []
    if tree["form"] == "chain":
        return [Setting(mode, n) for n in levels]
    usual = tree["nodes"] if tree["nodes"] == DRAFT_MODES[mode].nodes else None
    whole = Setting(mode, most, None if usual else tree["nodes"])
    if tree["form"] == "merged":  # of which any part would have been shared out otherwise
        return [whole]
    smaller = [n for n in NODES if n < tree["nodes"]]
    return [*(Setting(mode, k, n) for k in levels for n in smaller if n >= k), whole]


class Weigher:
    """Weighs the settings of one draft mode against plain decoding.

    Args:
        mode: of the drafts that were recorded.
        drafted: replays them, all levels and nodes.
        plain: replays plain decoding, recorded on the same texts in turns with them.
        settings: to be weighed; None: all that the recording can say something of.
    """

    def __init__(
        self,
        mode: str,
        drafted: Replay,
        plain: Replay,
        settings: Sequence[Setting] | None = None,
    ) -> None:
        self.settings = settings_of(mode, drafted.about) if settings is None else settings
        self.error = max(drafted.times.error, plain.times.error)
        self._drafted, self._plain = drafted, plain
        self._plain_runs: dict[int, Replayed] = {}

    def best(self, batch: int, rough: bool = True) -> Forecast | None:
        """Of the setting that is fastest at a batch size; None where nothing was drafted."""
        plain = self._plain_run(batch).tokens_per_second
        runs = [(setting, self._run(setting, batch)) for setting in self._likely(batch)]
        if not runs:
            return None
        setting, run = max(runs, key=lambda found: found[1].tokens_per_second)
        return self._forecast(setting, batch, run, plain, rough)

    def weigh(self, batch: int, rough: bool = True) -> Iterator[Forecast]:
        """Of every setting; ``rough``: see `Forecast`."""
        plain = self._plain_run(batch).tokens_per_second
        for setting in self.settings:
            yield self._forecast(setting, batch, self._run(setting, batch), plain, rough)

    def _likely(self, batch: int) -> Sequence[Setting]:
        """The settings that may be the fastest: replays take their time, so that of many those that
        are fastest in mid-decoding are replayed."""
        if len(self.settings) <= LIKELY:
            return self.settings

        def rate(setting: Setting) -> float:
            (cell,) = self._drafted.grid([setting.levels], [setting.most_nodes], [batch])
            return cell.tokens_per_second

        return sorted(self.settings, key=rate, reverse=True)[:LIKELY]

    def _run(self, setting: Setting, batch: int) -> Replayed:
        return self._drafted.run(Always(setting.levels, setting.most_nodes), together=batch)

    def _plain_run(self, batch: int) -> Replayed:
        if batch not in self._plain_runs:
            self._plain_runs[batch] = self._plain.run(Always(0), together=batch)
        return self._plain_runs[batch]

    def _forecast(
        self, setting: Setting, batch: int, run: Replayed, plain: float, rough: bool
    ) -> Forecast:
        speedup = run.tokens_per_second / plain
        length = run.decoding_length
        needed = length / speedup
        samples = [
            len(walks) / sum(1 + walked.accepted for walked in walks)
            for walks in run.by_request.values()
        ]
        return Forecast(
            setting=setting,
            batch=batch,
            speedup=speedup,
            interval=speedup_interval(speedup, samples, self.error),
            tokens_per_second=run.tokens_per_second,
            length=length,
            needed_length=needed,
            acceptance=acceptance_of(length, setting.levels) or 0.0,
            needed_acceptance=acceptance_of(needed, setting.levels),
            rough=rough,
            exact=run.covered,
        )
