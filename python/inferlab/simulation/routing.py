"""Which replica a request goes to."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod

from inferlab.simulation.setting import Setting


class Router(ABC):
    """Knows how many requests each replica has that have not ended.

    Attributes:
        load: of each replica.
    """

    def __init__(self, replicas: int) -> None:
        self.load = [0] * replicas

    @abstractmethod
    def choose(self, group: int) -> int:
        """The replica of a request of a group (-1: of none)."""

    def begins(self, replica: int) -> None:
        """It has got a request."""
        self.load[replica] += 1

    def ends(self, replica: int) -> None:
        """One of its requests has ended."""
        self.load[replica] -= 1


class RoundRobin(Router):
    """One after the other."""

    def __init__(self, replicas: int) -> None:
        super().__init__(replicas)
        self._last = -1

    def choose(self, group: int) -> int:
        self._last = (self._last + 1) % len(self.load)
        return self._last


class LeastLoaded(Router):
    """The one with the fewest; of several the one that has had so few for longest."""

    def __init__(self, replicas: int) -> None:
        super().__init__(replicas)
        self._with: list[dict[int, None]] = [dict.fromkeys(range(replicas))]
        self._least = 0

    def choose(self, group: int) -> int:
        return next(iter(self._with[self._least]))

    def begins(self, replica: int) -> None:
        self._move(replica, 1)

    def ends(self, replica: int) -> None:
        self._move(replica, -1)

    def _move(self, replica: int, by: int) -> None:
        before = self.load[replica]
        self.load[replica] = after = before + by
        del self._with[before][replica]
        if after == len(self._with):
            self._with.append({})
        self._with[after][replica] = None
        if after < self._least:
            self._least = after
        while not self._with[self._least]:
            self._least += 1


class TwoChoices(Router):
    """Of two at random the one with fewer."""

    def __init__(self, replicas: int, seed: int) -> None:
        super().__init__(replicas)
        self._random = random.Random(seed)

    def choose(self, group: int) -> int:
        count = len(self.load)
        if count == 1:
            return 0
        one = int(self._random.random() * count)
        other = int(self._random.random() * (count - 1))
        other += other >= one
        return other if self.load[other] < self.load[one] else one


class Prefix(LeastLoaded):
    """A group's own replica, while that has no more than ``bound`` times the mean load; else the
    next that has not, in an order of the group's own. Requests of no group: the least loaded.
    (Consistent hashing with bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018.)"""

    def __init__(self, replicas: int, bound: float, seed: int) -> None:
        super().__init__(replicas)
        self._bound, self._seed = bound, seed
        self._total = 0
        self._home: dict[int, tuple[int, int]] = {}

    def choose(self, group: int) -> int:
        if group < 0:
            return super().choose(group)
        count = len(self.load)
        if group not in self._home:
            drawn = random.Random(self._seed * 1_000_003 + group)
            self._home[group] = drawn.randrange(count), _stride(drawn, count)
        at, stride = self._home[group]
        most = math.ceil(self._bound * (self._total + 1) / count)
        while self.load[at] >= most:  # the mean load is below it, so somebody has room
            at = (at + stride) % count
        return at

    def begins(self, replica: int) -> None:
        super().begins(replica)
        self._total += 1

    def ends(self, replica: int) -> None:
        super().ends(replica)
        self._total -= 1


def _stride(drawn: random.Random, count: int) -> int:
    """One that meets all of ``count``."""
    while True:
        stride = drawn.randrange(1, count + 1)
        if math.gcd(stride, count) == 1:
            return stride


def make_router(setting: Setting, seed: int = 0) -> Router:
    """The router that a setting names."""
    if setting.routing == "round-robin":
        return RoundRobin(setting.replicas)
    if setting.routing == "least-loaded":
        return LeastLoaded(setting.replicas)
    if setting.routing == "two-choices":
        return TwoChoices(setting.replicas, seed)
    return Prefix(setting.replicas, setting.bound, seed)
