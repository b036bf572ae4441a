"""What a load's records say. Pure functions; each docstring has its formula.

Times are of the record: t_1 ... t_m of its chunks with content or reasoning, counted from when it
was sent, and n its new tokens by the server's ``usage``. What a stream cannot tell is None, with
the reason beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from inferlab.benchmarks.statistics import quantile_interval
from inferlab.load.outputs import (
    Category,
    Counts,
    Distribution,
    Goodput,
    LoadFigures,
    Rates,
    Throughput,
)
from inferlab.records import InLoad, RequestRecord

PERCENTILES = (50, 90, 95, 99)

_SILENT = "chunks do not tell how many tokens they hold"

SLOS: dict[str, Callable[[RequestRecord], float | None]] = {
    "ttft": lambda record: record.first_token_ms,
    "tpot": lambda record: tpot_ms(record),
    "e2e": lambda record: record.latency_ms,
}
"""What an SLO may bound, in ms."""


def load_figures(
    records: Sequence[RequestRecord],
    *,
    slos: Mapping[str, float] | None = None,
    asked_per_s: float | None = None,
) -> LoadFigures:
    """All figures of a load that its records tell.

    Args:
        slos: bounds in ms, keys of SLOS.
        asked_per_s: conversations that were to begin in a second, where that is one number.
    """
    good = [record for record in records if record.error is None]
    known: dict[str, Distribution | None] = {}
    not_known: dict[str, str] = {}
    for name, (values, reason) in _values(good).items():
        known[name] = distribution(values, independent=name not in ("itl_ms", "icl_ms"))
        if reason is not None:
            not_known[name] = reason
    passed = throughput(records, not_known)
    queue = [queue_ms(record) for record in records]
    return {
        "requests": counts(records),
        "failures": dict(Counter(in_load(r).failure or "" for r in records if r.error is not None)),
        "first_errors": _first_errors(records),
        "warnings": dict(Counter(w for record in records for w in in_load(record).warnings)),
        "distributions": known,
        "not_known": not_known,
        "throughput": passed,
        "goodput": goodput(records, slos) if slos else None,
        "rates": rates(records, asked_per_s),
        "queue_ms": distribution(queue),
        "categories": categories(records),
    }


def counts(records: Iterable[RequestRecord]) -> Counts:
    """How many were sent and what became of them; ``retries`` are tries beyond the first."""
    found: Counts = {"sent": 0, "succeeded": 0, "failed": 0, "interrupted": 0, "retries": 0}
    for record in records:
        found["sent"] += 1
        found["retries"] += _tries(record) - 1
        if record.error is None:
            found["succeeded"] += 1
        elif in_load(record).failure == "interrupted":
            found["interrupted"] += 1
        else:
            found["failed"] += 1
    return found


def tpot_ms(record: RequestRecord) -> float | None:
    """TPOT = (E2E - TTFT) / (n - 1) = (t_m - t_1) / (n - 1), n from ``usage``; None without usage,
    of one token, and where all came in one chunk, or in one read of the socket."""
    return (record.tpot_ms or None) if record.counted_by == "usage" else None


def itl_ms(record: RequestRecord) -> list[float] | None:
    """ITL, the time between tokens: the k tokens of chunk i came (t_i - t_j) / k apart, each, where
    j is the chunk before it that had tokens. None where chunks do not tell how many they hold."""
    tokens = in_load(record).chunk_tokens
    if tokens is None:
        return None
    times = record.text_times_ms
    found: list[float] = []
    before: float | None = None
    for at, count in zip(times, tokens, strict=True):
        if count and before is not None:
            found.extend([(at - before) / count] * count)
        if count:
            before = at
    return found


def tokens_per_chunk(record: RequestRecord) -> float | None:
    """n / m: above 1 where the server, or speculation, bundles tokens."""
    chunks = len(record.text_times_ms)
    return record.num_tokens / chunks if chunks and record.counted_by == "usage" else None


def queue_ms(record: RequestRecord) -> float:
    """How much later than scheduled it was sent: what the client itself, or its own limit of
    concurrency, kept it waiting."""
    load = in_load(record)
    return max(0.0, (load.sent_at - load.scheduled_at) * 1e3)


def duration_s(records: Sequence[RequestRecord]) -> float:
    """T: from the first request sent to the end of the last one."""
    if not records:
        return 0.0
    begin = min(in_load(record).sent_at for record in records)
    return max(_ended_at(record) for record in records) - begin


def throughput(records: Sequence[RequestRecord], not_known: dict[str, str]) -> Throughput:
    """What came in T (see `duration_s`): successful requests / T, the sums of their output and
    input tokens / T, and the most in a window.

    The windows divide T into equal parts of about 1 s, T / max(1, round(T)), so that the mean over
    T is the mean of the windows, and none of them can have the most and be below it.

    Args:
        not_known: gets the reasons of what is None.
    """
    good = [record for record in records if record.error is None]
    total_s = duration_s(records)

    def rate(amount: int) -> float:
        return amount / total_s if total_s > 0 else 0.0

    output = _sum_known([r.num_tokens if r.counted_by == "usage" else None for r in good])
    inputs = _sum_known([record.prompt_tokens for record in good])
    for name, value in (("output_tokens_per_s", output), ("input_tokens_per_s", inputs)):
        if value is None:
            not_known[name] = "usage is missing in some answers"
    begin = min((in_load(record).sent_at for record in records), default=0.0)
    ends = [_ended_at(record) - begin for record in good]
    chunks = [at for record in good for at in _chunk_times(record, begin)]
    peak_tokens = None
    if output is not None and all(in_load(record).chunk_tokens is not None for record in good):
        weights = [k for record in good for k in in_load(record).chunk_tokens or ()]
        peak_tokens = peak_per_s(chunks, total_s, weights)
    else:
        not_known["peak_output_tokens_per_s"] = _SILENT
    return {
        "duration_s": total_s,
        "requests_per_s": rate(len(good)),
        "output_tokens": output,
        "input_tokens": inputs,
        "output_tokens_per_s": None if output is None else rate(output),
        "input_tokens_per_s": None if inputs is None else rate(inputs),
        "peak_requests_per_s": peak_per_s(ends, total_s),
        "chunks_per_s": rate(len(chunks)),
        "peak_chunks_per_s": peak_per_s(chunks, total_s),
        "peak_output_tokens_per_s": peak_tokens,
    }


def peak_per_s(
    at_s: Sequence[float], total_s: float, weights: Sequence[float] | None = None
) -> float:
    """The most per second in one of max(1, round(T)) equal windows of T."""
    if not at_s or total_s <= 0:
        return 0.0
    windows = max(1, round(total_s))
    places = np.clip((np.asarray(at_s) / total_s * windows).astype(int), 0, windows - 1)
    sums = np.bincount(places, weights=weights, minlength=windows)
    return float(sums.max() / (total_s / windows))


def goodput(records: Sequence[RequestRecord], slos: Mapping[str, float]) -> Goodput:
    """Requests / T that succeeded and kept every SLO. One whose figure is not known kept none; how
    many those are is told."""
    kept = unknown = 0
    for record in records:
        if record.error is not None:
            continue
        found = {name: SLOS[name](record) for name in slos}
        if any(value is None for value in found.values()):
            unknown += 1
        elif all(value <= slos[name] for name, value in found.items() if value is not None):
            kept += 1
    total_s = duration_s(records)
    return {
        "slos_ms": dict(slos),
        "kept": kept,
        "not_known": unknown,
        "requests_per_s": kept / total_s if total_s > 0 else 0.0,
        "share": kept / len(records) if records else 0.0,
    }


def rates(records: Sequence[RequestRecord], asked_per_s: float | None) -> Rates:
    """How fast conversations were to begin, and began: (count - c) / (last - first), by schedule
    and as sent, where c were to begin at the first moment: one, but for bursts."""
    first = [in_load(record) for record in records if in_load(record).turn == 0]
    begin = min((load.scheduled_at for load in first), default=0.0)
    later = sum(load.scheduled_at > begin for load in first)

    def rate(times: list[float]) -> float | None:
        spread = max(times, default=0.0) - min(times, default=0.0)
        return later / spread if later and spread > 0 else None

    return {
        "asked_per_s": asked_per_s,
        "scheduled_per_s": rate([load.scheduled_at for load in first]),
        "sent_per_s": rate([load.sent_at for load in first]),
    }


def categories(records: Sequence[RequestRecord]) -> dict[str, Category]:
    """The main figures of each category, medians over its requests; empty where none is known."""
    found: dict[str, list[RequestRecord]] = {}
    for record in records:
        if (name := in_load(record).category) is not None:
            found.setdefault(name, []).append(record)
    rows: dict[str, Category] = {}
    for name, own in found.items():
        good = [record for record in own if record.error is None]
        rows[name] = {
            "requests": len(own),
            "failed": counts(own)["failed"],
            "output_tokens": _sum_known(
                [r.num_tokens if r.counted_by == "usage" else None for r in good]
            ),
            "ttft_ms": _median([record.first_token_ms for record in good]),
            "tpot_ms": _median([tpot_ms(record) for record in good]),
            "e2e_ms": _median([record.latency_ms for record in good]),
            "tokens_per_chunk": _median([tokens_per_chunk(record) for record in good]),
        }
    return rows


def distribution(values: Sequence[float], *, independent: bool = True) -> Distribution | None:
    """Percentiles (linear between order statistics) with bootstrap intervals; None of no values.

    Args:
        independent: of several values of one request, which are not, there are no intervals.
    """
    if not len(values):
        return None
    samples = np.asarray(values, dtype=np.float64)
    points = {q: float(np.percentile(samples, q)) for q in PERCENTILES}
    ends = {q: quantile_interval(samples, q / 100) if independent else None for q in PERCENTILES}
    return {
        "count": len(samples),
        "mean": float(samples.mean()),
        "std": float(samples.std(ddof=1)) if len(samples) > 1 else 0.0,
        "min": float(samples.min()),
        "max": float(samples.max()),
        "p50": points[50],
        "p90": points[90],
        "p95": points[95],
        "p99": points[99],
        "p50_ci95": ends[50],
        "p90_ci95": ends[90],
        "p95_ci95": ends[95],
        "p99_ci95": ends[99],
    }


def in_load(record: RequestRecord) -> InLoad:
    """The record's place in its load.

    Raises:
        ValueError: it is not of a load.
    """
    if record.exchange is None or record.exchange.load is None:
        raise ValueError("the record is of no load")
    return record.exchange.load


def _values(good: Sequence[RequestRecord]) -> dict[str, tuple[list[float], str | None]]:
    """Of each distribution its values, and why some requests have none."""

    def each(
        figure: Callable[[RequestRecord], float | None], why: Callable[[RequestRecord], str]
    ) -> tuple[list[float], str | None]:
        values, lacking = [], Counter[str]()
        for record in good:
            value = figure(record)
            if value is None:
                lacking[why(record)] += 1
            else:
                values.append(value)
        return values, _reasons(lacking, len(good))

    tokens = [itl_ms(record) for record in good]
    silent = Counter(
        "its chunks do not tell how many tokens they hold" for t in tokens if t is None
    )
    single = Counter("one chunk for all" for r in good if len(r.text_times_ms) < 2)
    return {
        "ttft_ms": each(lambda r: r.first_token_ms, lambda r: "no text came"),
        "ttft_content_ms": each(
            lambda r: in_load(r).first_content_ms, lambda r: "no content came"
        ),
        "tpot_ms": each(tpot_ms, _why_no_tpot),
        "itl_ms": (
            [gap for gaps in tokens for gap in gaps or ()],
            _reasons(silent, len(good)),
        ),
        "icl_ms": ([gap for r in good for gap in r.itl_ms], _reasons(single, len(good))),
        "tokens_per_chunk": each(
            tokens_per_chunk,
            lambda r: "no usage" if r.counted_by != "usage" else "no text came",
        ),
        "e2e_ms": each(lambda r: r.latency_ms, lambda r: ""),
        "connect_ms": each(
            lambda r: in_load(r).connect_ms, lambda r: "its connection was used again"
        ),
    }  # fmt: skip


def _why_no_tpot(record: RequestRecord) -> str:
    if record.counted_by != "usage":
        return "no usage"
    return "all came at one time" if record.num_tokens > 1 else "no second token"


def _reasons(lacking: Counter[str], among: int) -> str | None:
    parts = [f"{count} of {among} requests: {why}" for why, count in lacking.items()]
    return "; ".join(parts) if parts else None


def _first_errors(records: Iterable[RequestRecord]) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in records:
        if record.error is not None:
            found.setdefault(in_load(record).failure or "", record.error)
    return found


def _ended_at(record: RequestRecord) -> float:
    """Unix time at its last byte, or when it failed."""
    return record.started_at + max(record.latency_ms, in_load(record).end_ms or 0.0) / 1e3


def _chunk_times(record: RequestRecord, begin: float) -> list[float]:
    start = record.started_at - begin
    return [start + at / 1e3 for at in record.text_times_ms]


def _tries(record: RequestRecord) -> int:
    return record.exchange.attempts if record.exchange is not None else 1


def _sum_known(values: Sequence[int | None]) -> int | None:
    """The sum; None where one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _median(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.median(known)) if known else None
