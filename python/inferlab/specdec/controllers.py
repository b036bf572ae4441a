"""K controllers: how many levels to draft in the next step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol, runtime_checkable

from inferlab.config import MAX_DRAFT
from inferlab.types import check

CONTROLLERS = ("fixed", "adaptive", "cost")


@dataclass(frozen=True)
class StepObservation:
    """What a step told: its size, what it took and what was accepted.

    ``depths`` and ``accepted``: levels offered to and accepted from each sequence.
    ``caught_up``: the drafter had to process tokens of earlier steps first, so its time says
    nothing about a usual step.
    """

    batch_size: int
    k: int
    step_ms: float
    depths: list[int]
    accepted: list[int]
    caught_up: bool = False


@runtime_checkable
class Controller(Protocol):
    """Chooses K before each step and hears how it went."""

    @property
    def max_k(self) -> int: ...

    def choose(self, batch_size: int) -> int:
        """Levels to draft, in [0, max_k]."""
        ...

    def observe(self, step: StepObservation) -> None: ...

    def describe(self) -> dict[str, Any]: ...


class FixedController:
    """Always the same K."""

    def __init__(self, k: int = 4) -> None:
        check("k", k, 0 <= k <= MAX_DRAFT, f"an integer from 0 to {MAX_DRAFT}")
        self.max_k = k

    def choose(self, batch_size: int) -> int:
        return self.max_k

    def observe(self, step: StepObservation) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"controller": "fixed", "k": self.max_k}


class AdaptiveController:
    """Moves K by one towards a target acceptance rate.

    The rate is the share of offered levels that were accepted, over a sliding window of steps. K
    goes up while it is above the target, down while it is below, within [min_k, max_k].
    """

    WINDOW = 8

    def __init__(self, min_k: int = 1, max_k: int = 8, target_acceptance: float = 0.7) -> None:
        check("min_k", min_k, 0 <= min_k <= MAX_DRAFT, f"an integer from 0 to {MAX_DRAFT}")
        check("max_k", max_k, min_k <= max_k <= MAX_DRAFT, f"an integer from min_k to {MAX_DRAFT}")
        check("target_acceptance", target_acceptance, 0 <= target_acceptance <= 1, "in [0, 1]")
        self.min_k = min_k
        self.max_k = max_k
        self.target_acceptance = target_acceptance
        self.k = (min_k + max_k + 1) // 2
        self._recent: deque[tuple[int, int]] = deque(maxlen=self.WINDOW)

    def choose(self, batch_size: int) -> int:
        return self.k

    def observe(self, step: StepObservation) -> None:
        offered = sum(step.depths)
        if not offered:
            return
        self._recent.append((sum(step.accepted), offered))
        rate = sum(a for a, _ in self._recent) / sum(o for _, o in self._recent)
        if rate > self.target_acceptance:
            self.k = min(self.k + 1, self.max_k)
        elif rate < self.target_acceptance:
            self.k = max(self.k - 1, self.min_k)

    def describe(self) -> dict[str, Any]:
        return {
            "controller": "adaptive",
            "k": self.k,
            "min_k": self.min_k,
            "max_k": self.max_k,
            "target_acceptance": self.target_acceptance,
        }


@dataclass
class _Costs:
    """What is known about one batch size: measured step times, the K in use, what to try next."""

    plan: list[int]  # K to run before deciding again: the warm-up, later probes
    interval: int
    until_probe: int
    times: dict[int, deque[float]] = field(default_factory=dict)
    current: int = 0


class CostController:
    """Picks the K, 0 included, that gives the most tokens per second.

    expected tokens(K) / step time(K), where

    * expected tokens = 1 + sum over i <= K of the probability that levels 1..i are all accepted,
      from per-level conditional acceptance with exponential forgetting;
    * step time is the median of the last measured steps of that K (draft, verify and overhead),
      interpolated for a K that was not measured, per batch size (in powers of two).

    A short warm-up measures K = 0, max and some in between. Afterwards other K are measured again
    now and then; while K = 0 is best, at intervals that double up to ``MAX_PROBE_INTERVAL`` steps,
    so that a useless drafter costs next to nothing.
    """

    FORGET = 0.98  # weight of what was known, per step
    SAMPLES = 9  # step times kept per K
    PROBE_INTERVAL = 32
    MAX_PROBE_INTERVAL = 1024
    MARGIN = 1.02  # what another K must promise before it is taken

    def __init__(self, max_k: int = 8) -> None:
        check("max_k", max_k, 0 <= max_k <= MAX_DRAFT, f"an integer from 0 to {MAX_DRAFT}")
        self.max_k = max_k
        self._accepted = [0.0] * max_k
        self._reached = [0.0] * max_k
        self._costs: dict[int, _Costs] = {}
        self._probe_turn = 0

    def choose(self, batch_size: int) -> int:
        costs = self._of(batch_size)
        return costs.plan[0] if costs.plan else costs.current

    def observe(self, step: StepObservation) -> None:
        self._learn_acceptance(step)
        costs = self._of(step.batch_size)
        if not step.caught_up:
            costs.times.setdefault(step.k, deque(maxlen=self.SAMPLES)).append(step.step_ms)
        if costs.plan:
            # Taken off even if the engine ran a smaller K than asked for, near a sequence's end.
            costs.plan.pop(0)
        if not costs.plan:
            self._decide(costs)

    def describe(self) -> dict[str, Any]:
        by_size = {2 ** (bits - 1): costs for bits, costs in sorted(self._costs.items())}
        return {
            "controller": "cost",
            "max_k": self.max_k,
            "chosen_k": {size: costs.current for size, costs in by_size.items()},
            "step_ms": {
                size: {k: round(median(v), 4) for k, v in sorted(costs.times.items())}
                for size, costs in by_size.items()
            },
            "acceptance": [round(p, 4) for p in self._conditional()],
        }

    def _of(self, batch_size: int) -> _Costs:
        bits = batch_size.bit_length()
        if bits not in self._costs:
            self._costs[bits] = _Costs(self._warmup(), self.PROBE_INTERVAL, self.PROBE_INTERVAL)
        return self._costs[bits]

    def _warmup(self) -> list[int]:
        if self.max_k == 0:
            return []
        middle = (self.max_k + 1) // 2
        # The first step of a batch pays for cold caches: K = max is measured again later.
        return [self.max_k, 0, middle, 0, self.max_k, 1, 0, middle, self.max_k, 0]

    def _learn_acceptance(self, step: StepObservation) -> None:
        # A level that the drafter did not offer (no n-gram found, say) counts as not accepted.
        for i in range(min(step.k, self.max_k)):
            self._accepted[i] *= self.FORGET
            self._reached[i] *= self.FORGET
        for accepted in step.accepted:
            for i in range(min(step.k, accepted + 1, self.max_k)):
                self._reached[i] += 1
                self._accepted[i] += i < accepted

    def _conditional(self) -> list[float]:
        """P(level i accepted | the levels before it were), shrunk towards the level before."""
        chances: list[float] = []
        for accepted, reached in zip(self._accepted, self._reached, strict=True):
            prior = chances[-1] if chances else 0.5
            chances.append((accepted + prior) / (reached + 1))
        return chances

    def _expected_tokens(self) -> list[float]:
        expected, survive = [1.0], 1.0
        for chance in self._conditional():
            survive *= chance
            expected.append(expected[-1] + survive)
        return expected

    @staticmethod
    def _step_time(times: dict[int, float], k: int) -> float:
        """Measured, or on the line through the nearest measured neighbours."""
        if k in times:
            return times[k]
        known = sorted(times)
        lower = max((x for x in known if x < k), default=known[0])
        upper = min((x for x in known if x > k), default=known[-1])
        if not lower < k < upper:
            lower, upper = known[0], known[-1]
        if lower == upper:
            return times[lower]
        slope = (times[upper] - times[lower]) / (upper - lower)
        return max(times[lower] + slope * (k - lower), 1e-6)

    def _decide(self, costs: _Costs) -> None:
        times = {k: median(v) for k, v in costs.times.items()}
        if not times or self.max_k == 0:
            return
        rates = [
            tokens / self._step_time(times, k) for k, tokens in enumerate(self._expected_tokens())
        ]
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] > rates[costs.current] * self.MARGIN:
            costs.current = best
        costs.until_probe -= 1
        if costs.until_probe <= 0:
            self._plan_probe(costs)

    def _plan_probe(self, costs: _Costs) -> None:
        if costs.current == 0:
            # Twice: a drafter that slept catches up in the first.
            costs.plan = [min(2, self.max_k)] * 2
            costs.interval = min(2 * costs.interval, self.MAX_PROBE_INTERVAL)
        else:
            costs.interval = self.PROBE_INTERVAL
            others = (0, min(costs.current + 1, self.max_k), costs.current - 1)
            costs.plan = [others[self._probe_turn % len(others)]]
            self._probe_turn += 1
        costs.until_probe = costs.interval


def make_controller(
    name: str,
    *,
    k: int = 4,
    min_k: int = 1,
    max_k: int = 8,
    target_acceptance: float = 0.7,
) -> Controller:
    """The controller ``name``: ``k`` for fixed, the bounds for adaptive, ``max_k`` for cost."""
    check("controller", name, name in CONTROLLERS, f"one of {', '.join(CONTROLLERS)}")
    if name == "fixed":
        return FixedController(k)
    if name == "adaptive":
        return AdaptiveController(min_k, max_k, target_acceptance)
    return CostController(max_k)
