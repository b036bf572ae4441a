"""The JSON of a load as types, of which its schema is made."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from inferlab.benchmarks.outputs import Environment, Interval
from inferlab.records import RecordJson


class Distribution(TypedDict):
    """See `metrics.distribution`."""

    count: int
    mean: float
    std: float
    min: float
    max: float
    p50: float
    p90: float
    p95: float
    p99: float
    p50_ci95: Interval
    p90_ci95: Interval
    p95_ci95: Interval
    p99_ci95: Interval


class Counts(TypedDict):
    """See `metrics.counts`."""

    sent: int
    succeeded: int
    failed: int
    interrupted: int
    retries: int


class Throughput(TypedDict):
    """See `metrics.throughput`; tokens are None where some answers have no usage."""

    duration_s: float
    requests_per_s: float
    output_tokens: int | None
    input_tokens: int | None
    output_tokens_per_s: float | None
    input_tokens_per_s: float | None
    peak_requests_per_s: float
    chunks_per_s: float
    peak_chunks_per_s: float
    peak_output_tokens_per_s: float | None


class Goodput(TypedDict):
    """See `metrics.goodput`."""

    slos_ms: dict[str, float]
    kept: int
    not_known: int
    requests_per_s: float
    share: float


class Rates(TypedDict):
    """See `metrics.rates`."""

    asked_per_s: float | None
    scheduled_per_s: float | None
    sent_per_s: float | None


class Category(TypedDict):
    """See `metrics.categories`."""

    requests: int
    failed: int
    output_tokens: int | None
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    tokens_per_chunk: float | None


class LoadFigures(TypedDict):
    """See `metrics.load_figures`. ``not_known``: name of a figure -> why it, or a part of what it
    is made of, is not known."""

    requests: Counts
    failures: dict[str, int]
    first_errors: dict[str, str]
    warnings: dict[str, int]
    distributions: dict[str, Distribution | None]
    not_known: dict[str, str]
    throughput: Throughput
    goodput: Goodput | None
    rates: Rates
    queue_ms: Distribution | None
    categories: dict[str, Category]


class ArrivalSettings(TypedDict):
    """See `arrivals.Arrivals`; a trace's times are those of its records."""

    kind: str
    rate: float | None
    rate_end: float | None
    ramp_s: float | None
    shape: float
    burst: int
    seed: int


class LoadSettings(TypedDict):
    """What was asked of whom, and how: see `plan.LoadPlan` and `plan.Asking`."""

    arrivals: ArrivalSettings
    concurrency: int | None
    count: int | None
    duration_s: float | None
    processes: int
    warmup: int
    conversations: int
    turns: int
    max_tokens: int
    temperature: float
    seed: int | None
    extra: dict[str, Any]
    retries: int
    limits_s: dict[str, float | None]
    error_budget: str


class ClientFigures(TypedDict):
    """How the client itself did: ``loop_lag_ms`` over all its processes, of ``loop_lags_ms``, each
    process's samples in order; ``cpu_share``, ``cpu_s`` over ``wall_s`` of each."""

    loop_lag_ms: Distribution | None
    loop_lags_ms: NotRequired[list[list[float]]]
    cpu_share: list[float]
    cpu_s: NotRequired[list[float]]
    wall_s: NotRequired[list[float]]


class Recount(TypedDict):
    """See `recount.recount`."""

    tokenizer: str
    requests: int
    by_usage: int
    by_tokenizer: int
    differing: int
    largest_difference: int
    not_compared: int
    prompts: int
    prompts_by_usage: int
    prompts_by_tokenizer: int


class AcceptanceFigures(TypedDict):
    """How drafts fared (`acceptance.Acceptance`): ``of_server`` from what ``/metrics`` grew by
    during the load, warm-up and other clients included; ``of_answers`` added up of those answers
    that tell."""

    of_server: dict[str, Any] | None
    of_answers: dict[str, Any] | None
    answers: int


class LoadStats(LoadFigures):
    """One load."""

    mode: Literal["http"]
    settings: LoadSettings
    environment: Environment
    server: str
    endpoint: str
    model: str | None
    proxy: str | None
    interrupted: bool
    within_budget: bool
    client: ClientFigures
    recount: Recount | None
    acceptance: AcceptanceFigures
    records: list[RecordJson]


class SweepLevel(TypedDict):
    """A load among those of a sweep: its main figures; ``gain`` is of its output tokens (requests,
    where tokens are not known) per second over the best before, None for the first."""

    level: float
    requests_per_s: float
    output_tokens_per_s: float | None
    gain: float | None
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    goodput_per_s: float | None
    failed: int


class SweepStats(TypedDict):
    """Loads of growing ``of``, each twice the one before."""

    mode: Literal["http"]
    of: Literal["concurrency", "rate"]
    stop_below_gain: float
    stopped: Literal["saturated", "failures", "interrupted", "levels"]
    interrupted: bool
    levels: list[SweepLevel]
    loads: list[LoadStats]
