"""What a simulated load comes to, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from typing_extensions import TypedDict

from inferlab.simulation.clock import Outcome

SHARES = (50, 90, 99)


class Spread(TypedDict):
    """Of a time over requests, in ms."""

    mean: float
    p50: float
    p90: float
    p99: float


class Summary(TypedDict):
    """A load under one setting."""

    model: str  # of the replicas: "real" (the engine's scheduler) or "light"
    requests: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    within: float  # share of requests within all objectives
    goodput: float  # of them, requests per second
    ttft_ms: Spread
    tpot_ms: Spread | None  # None: no request has two tokens
    e2e_ms: Spread
    utilisation: float  # share of time in which a replica makes a step, in the mean
    utilisation_most: float  # of the busiest
    queue: float  # requests that wait at a replica, in the mean over time
    queue_most: int
    pages: float  # in use at a replica, in the mean over time
    pages_most: float
    tokens_per_step: float  # of a sequence in a decoding step
    batch: float  # sequences of a step
    shared: float  # share of the prompts' tokens that were not read
    preempted: int


@dataclass(frozen=True)
class Objectives:
    """What clients are promised, in ms; None: nothing.

    Attributes:
        ttft, tpot, e2e: time to the first token, per token behind it, to the last one.
    """

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None


NOTHING = Objectives()


def summarize(outcome: Outcome, objectives: Objectives = NOTHING, warm_up: float = 0.0) -> Summary:
    """Numbers of a run.

    Args:
        warm_up: share of the requests, the first ones, that times and goodput leave out.
    """
    output = outcome.requests.output
    counted = np.arange(len(output)) >= int(warm_up * len(output))
    ttft = (outcome.first - outcome.arrived) * 1e3
    e2e = (outcome.ended - outcome.arrived) * 1e3
    several = output > 1
    tpot = np.zeros(len(output))
    tpot[several] = (e2e - ttft)[several] / (output[several] - 1)
    good = np.ones(len(output), bool)
    for times, most in ((ttft, objectives.ttft), (tpot, objectives.tpot), (e2e, objectives.e2e)):
        if most is not None:
            good &= times <= most
    within = float(good[counted].mean())
    seconds, tally, replicas = outcome.seconds, outcome.tally, outcome.setting.replicas
    span = outcome.ended[counted].max() - outcome.arrived[counted].min()
    prompts = max(int(outcome.requests.prompt.sum()), 1)
    return {
        "model": outcome.model,
        "requests": len(output),
        "seconds": seconds,
        "requests_per_second": len(output) / seconds,
        "tokens_per_second": tally.tokens / seconds,
        "within": within,
        "goodput": float(good[counted].sum() / span),
        "ttft_ms": _spread(ttft[counted]),
        "tpot_ms": _spread(tpot[several & counted]) if np.any(several & counted) else None,
        "e2e_ms": _spread(e2e[counted]),
        "utilisation": tally.busy_s / (seconds * replicas),
        "utilisation_most": outcome.busiest_s / seconds,
        "queue": tally.waited_s / (seconds * replicas),
        "queue_most": tally.longest_queue,
        "pages": tally.page_s / (seconds * replicas),
        "pages_most": tally.most_pages,
        "tokens_per_step": (tally.tokens - tally.ended) / max(tally.walks, 1),
        "batch": tally.walks / max(tally.steps, 1),
        "shared": tally.shared / prompts,
        "preempted": tally.preempted,
    }


def _spread(times: np.ndarray) -> Spread:
    p50, p90, p99 = np.percentile(times, SHARES).tolist()
    return {"mean": float(times.mean()), "p50": p50, "p90": p90, "p99": p99}
