"""When an open load sends: seconds after its start, from a seed. Pure: nobody sleeps here.

A closed load has no arrivals: its next conversation begins when one has ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Literal

import numpy as np

Kind = Literal["closed", "constant", "poisson", "gamma", "burst", "ramp", "trace"]


@dataclass(frozen=True)
class Arrivals:
    """How conversations come.

    Attributes:
        kind: "closed" (``concurrency`` users, each begins its next conversation when the last one
            has ended), "constant" (every 1 / rate s), "poisson" and "gamma" (independent gaps of
            mean 1 / rate s), "burst" (``burst`` at once, every burst / rate s), "ramp" (the rate
            rises or falls in a straight line), "trace" (``at_s``).
        rate: conversations a second; of a ramp: at its start.
        rate_end, ramp_s: of a ramp: the rate at its end, and how long it takes; it stays there.
        shape: of the gamma distribution of gaps: 1 is Poisson, below it comes in clusters, above
            it more evenly (the coefficient of variation is shape ** -0.5).
        burst: how many come at once.
        at_s: of a trace: seconds after the start, ascending.
        seed: of poisson and gamma.
    """

    kind: Kind
    rate: float | None = None
    rate_end: float | None = None
    ramp_s: float | None = None
    shape: float = 1.0
    burst: int = 1
    at_s: tuple[float, ...] = field(default=(), repr=False)
    seed: int = 0

    def times(self) -> Iterator[float]:
        """Seconds after the start, ascending; endless but for a trace.

        Raises:
            ValueError: a closed load, or a number that is not allowed.
        """
        if self.kind == "closed":
            raise ValueError("a closed load has no arrivals")
        if self.kind == "trace":
            return iter(_ascending(self.at_s))
        rate = _positive("rate", self.rate)
        if self.kind == "constant":
            return (index / rate for index in _naturals())
        if self.kind == "burst":
            size = int(_positive("burst", self.burst))
            return (index // size * size / rate for index in _naturals())
        if self.kind == "ramp":
            end, over = _positive("rate_end", self.rate_end), _positive("ramp_s", self.ramp_s)
            return (ramp_time(index, rate, end, over) for index in _naturals())
        shape = 1.0 if self.kind == "poisson" else _positive("shape", self.shape)
        return _random_times(rate, shape, self.seed)


def ramp_time(count: float, rate: float, end: float, over_s: float) -> float:
    """When ``count`` have come, where the rate goes from ``rate`` to ``end`` in ``over_s``.

    Until then ``n(t) = rate t + (end - rate) t**2 / (2 over_s)``, solved for t; from then on the
    rate stays.
    """
    at_end = (rate + end) / 2 * over_s
    if count >= at_end:
        return over_s + (count - at_end) / end
    slope = (end - rate) / over_s
    # The root of slope/2 t^2 + rate t - count in a form that does not cancel, slope 0 included.
    return 2 * count / (rate + math.sqrt(rate * rate + 2 * slope * count))


def shard(times: Iterator[float], index: int, of: int) -> Iterator[float]:
    """Every ``of``-th time, from ``index`` on: the shards of a load make up the whole of it."""
    return islice(times, index, None, of)


def _random_times(rate: float, shape: float, seed: int) -> Iterator[float]:
    """The first gap is one of the process, too: nothing comes at 0."""
    rng = np.random.default_rng(seed)
    now = 0.0
    while True:
        for gap in rng.gamma(shape, 1 / (rate * shape), size=256):
            now += float(gap)
            yield now


def _naturals() -> Iterator[int]:
    index = 0
    while True:
        yield index
        index += 1


def _positive(name: str, value: float | None) -> float:
    if value is None or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a number above 0")
    return float(value)


def _ascending(times: Sequence[float]) -> Sequence[float]:
    if any(later < sooner for sooner, later in pairwise(times)):
        raise ValueError("at_s must ascend: a trace is sent in the order of its times")
    return times
