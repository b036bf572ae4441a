"""One load, run and told: from a plan to its figures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from inferlab.benchmarks.environment import describe_environment
from inferlab.client.proxies import client_for
from inferlab.load.acceptance import Acceptance, total_acceptance
from inferlab.load.metrics import distribution, in_load, load_figures
from inferlab.load.outputs import AcceptanceFigures, LoadSettings, LoadStats
from inferlab.load.plan import Asking, ErrorBudget, LoadPlan
from inferlab.load.processes import Outcome, run_load
from inferlab.load.recount import recount
from inferlab.load.server_stats import Scrape, acceptance_between, parse_metrics
from inferlab.records import RequestRecord

logger = logging.getLogger(__name__)


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
    budget: ErrorBudget = field(default_factory=ErrorBudget)
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
    before: Scrape | None = None

    def warm() -> None:
        nonlocal before
        before = scrape(plan.asking)

    outcome = run_load(plan, how.processes, keep, warm)
    after = None if before is None else scrape(plan.asking)
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
            "loop_lags_ms": [[round(lag, 3) for lag in ran.loop_lag_ms] for ran in outcome.ran],
            "cpu_share": [ran.cpu_s / ran.wall_s for ran in outcome.ran],
            "cpu_s": [ran.cpu_s for ran in outcome.ran],
            "wall_s": [ran.wall_s for ran in outcome.ran],
        },
        "recount": None if how.tokenizer is None else recount(records, *how.tokenizer),
        "acceptance": _acceptance(records, plan, before, after),
        "records": [record.as_json() for record in records],
    }


def scrape(asking: Asking) -> Scrape | None:
    """What the server tells on ``/metrics``; None where it has none that can be read."""
    headers = {"Authorization": f"Bearer {asking.api_key}"} if asking.api_key else {}
    try:
        with client_for(httpx.URL(asking.url), headers, asking.limits.connect_s)[0] as http:
            answer = http.get(f"{asking.url}/metrics")
        return parse_metrics(answer.text) if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError) as error:
        logger.debug("no /metrics: %s", error)
        return None


def _acceptance(
    records: Sequence[RequestRecord], plan: LoadPlan, before: Scrape | None, after: Scrape | None
) -> AcceptanceFigures:
    told = [
        Acceptance(**{**found, "accepted_at": at and tuple(at)})
        for record in records
        if (found := in_load(record).acceptance) is not None
        for at in (found["accepted_at"],)
    ]
    of_server = None
    if before is not None and after is not None:
        of_server = acceptance_between(before, after, plan.asking.model)
    of_answers = total_acceptance(told)
    return {
        "of_server": None if of_server is None else asdict(of_server),
        "of_answers": None if of_answers is None else asdict(of_answers),
        "answers": len(told),
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
