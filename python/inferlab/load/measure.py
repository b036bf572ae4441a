"""One load, run and told: from a plan to its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from inferlab.benchmarks.environment import describe_environment
from inferlab.load.metrics import distribution, load_figures
from inferlab.load.outputs import LoadSettings, LoadStats
from inferlab.load.plan import LoadPlan
from inferlab.load.processes import Outcome, run_load
from inferlab.load.recount import recount
from inferlab.records import RequestRecord


@dataclass(frozen=True)
class ErrorBudget:
    """How many requests may fail: a number, or a share of those sent."""

    count: int = 0
    share: float | None = None

    def holds(self, failed: int, sent: int) -> bool:
        allowed = self.count if self.share is None else self.share * sent
        return failed <= allowed

    def __str__(self) -> str:
        return str(self.count) if self.share is None else f"{self.share * 100:g}%"


@dataclass(frozen=True)
class Measured:
    """How a load is run and judged, beside what is sent.

    Attributes:
        slos: bounds in ms, keys of `metrics.SLOS`.
        tokenizer: (tokenizer, name): counts the answers' tokens again.
        proxy: how the proxy is named in results: the variable that names it, never its address.
    """

    processes: int = 1
    slos: Mapping[str, float] = field(default_factory=dict)
    budget: ErrorBudget = ErrorBudget()
    tokenizer: tuple[Any, str] | None = None
    proxy: str | None = None


def measure_load(
    plan: LoadPlan, how: Measured, keep: Callable[[RequestRecord], None] | None = None
) -> LoadStats:
    """Runs a load and tells what came; also of one that Ctrl-C ended.

    Args:
        keep: called with each record as soon as its request has ended.

    Raises:
        ValueError: what `processes.run_load` refuses.
    """
    outcome = run_load(plan, how.processes, keep)
    records = outcome.records
    kind = plan.arrivals.kind
    asked = plan.arrivals.rate if kind in ("constant", "poisson", "gamma", "burst") else None
    figures = load_figures(records, slos=how.slos, asked_per_s=asked)
    requests = figures["requests"]
    models = [record.model for record in records if record.model is not None]
    return {
        **figures,
        "mode": "http",
        "settings": _settings(plan, how),
        "environment": describe_environment(),  # type: ignore[typeddict-item]
        "server": plan.asking.url,
        "endpoint": plan.asking.endpoint,
        "model": plan.asking.model or (models[0] if models else None),
        "proxy": how.proxy,
        "interrupted": outcome.interrupted,
        "within_budget": how.budget.holds(requests["failed"], requests["sent"]),
        "client": {
            "loop_lag_ms": distribution(_lags(outcome), independent=False),
            "cpu_share": [ran.cpu_s / outcome.wall_s for ran in outcome.ran],
        },
        "recount": None if how.tokenizer is None else recount(records, *how.tokenizer),
        "acceptance": None,
        "records": [record.as_json() for record in records],
    }


def _settings(plan: LoadPlan, how: Measured) -> LoadSettings:
    asking, arrivals = plan.asking, plan.arrivals
    return {
        "arrivals": {
            "kind": arrivals.kind,
            "rate": arrivals.rate,
            "rate_end": arrivals.rate_end,
            "ramp_s": arrivals.ramp_s,
            "shape": arrivals.shape,
            "burst": arrivals.burst,
            "seed": arrivals.seed,
        },
        "concurrency": plan.concurrency,
        "count": plan.count,
        "duration_s": plan.duration_s,
        "processes": how.processes,
        "warmup": plan.warmup,
        "conversations": len(plan.conversations),
        "turns": sum(len(conversation.turns) for conversation in plan.conversations),
        "max_tokens": asking.max_tokens,
        "temperature": asking.temperature,
        "seed": asking.seed,
        "extra": dict(asking.extra),
        "retries": asking.retries,
        "limits_s": asdict(asking.limits),
        "error_budget": str(how.budget),
    }


def _lags(outcome: Outcome) -> list[float]:
    return [lag for ran in outcome.ran for lag in ran.loop_lag_ms]
