"""Figures of a load, from records made by hand whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.loads import record_of_times
from inferlab.benchmarks.statistics import bootstrap_interval, quantile_interval
from inferlab.load.metrics import (
    distribution,
    duration_s,
    goodput,
    itl_ms,
    load_figures,
    peak_per_s,
    queue_ms,
    throughput,
    tokens_per_chunk,
    tpot_ms,
)


def test_tpot_is_of_the_tokens_behind_the_first():
    assert tpot_ms(record_of_times(10, 30, 70, tokens=7)) == 10.0  # (70 - 10) / 6


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (record_of_times(10, 30), "no usage"),
        (record_of_times(10, tokens=5), "all came at one time"),
        (record_of_times(10, 10, 10, tokens=5), "all came at one time"),
        (record_of_times(10, tokens=1), "no second token"),
        (record_of_times(tokens=0), "no second token"),
    ],
)
def test_tpot_that_cannot_be_told_has_a_reason(record, why):
    assert tpot_ms(record) is None
    figures = load_figures([record])
    assert figures["distributions"]["tpot_ms"] is None
    assert figures["not_known"]["tpot_ms"] == f"1 of 1 requests: {why}"


def test_itl_spreads_a_chunk_over_its_tokens():
    record = record_of_times(10, 30, 40, 70, tokens=8, chunk_tokens=[2, 4, 0, 2])
    assert itl_ms(record) == [5.0] * 4 + [20.0] * 2  # the chunk at 40 ends no token
    assert record.itl_ms == [20, 10, 30]  # between chunks
    assert itl_ms(record_of_times(10, 30, tokens=2)) is None
    figures = load_figures([record, record_of_times(10, 30, tokens=2)])
    assert figures["distributions"]["itl_ms"]["count"] == 6
    assert figures["not_known"]["itl_ms"].startswith("1 of 2 requests")
    assert figures["distributions"]["icl_ms"]["count"] == 4


def test_tokens_per_chunk():
    assert tokens_per_chunk(record_of_times(1, 2, tokens=7)) == 3.5
    assert tokens_per_chunk(record_of_times(1, 2)) is None


def test_reasoning_is_a_first_token_and_no_first_content():
    record = record_of_times(10, 30, 50, tokens=3, first_content_ms=50)
    figures = load_figures([record, record_of_times(10, tokens=1, first_content_ms=None)])
    assert figures["distributions"]["ttft_ms"]["mean"] == 10
    assert figures["distributions"]["ttft_content_ms"]["mean"] == 50
    assert figures["not_known"]["ttft_content_ms"] == "1 of 2 requests: no content came"


def two_seconds() -> list:
    """Four answers and a failure within 2 s."""
    return [
        record_of_times(100, 500, tokens=10, sent_at=0.0, chunk_tokens=[4, 6]),
        record_of_times(100, 900, tokens=20, sent_at=0.0, chunk_tokens=[10, 10]),
        record_of_times(100, 200, tokens=30, sent_at=1.0, chunk_tokens=[15, 15]),
        record_of_times(500, 1000, tokens=40, sent_at=1.0, chunk_tokens=[20, 20]),
        record_of_times(50, sent_at=0.5, end_ms=100, failure="stall", tries=3),
    ]


def test_throughput_times_time_is_what_came():
    records = two_seconds()
    found = throughput(records, {})
    assert duration_s(records) == found["duration_s"] == 2.0
    assert found["requests_per_s"] == 2.0
    assert found["output_tokens_per_s"] * found["duration_s"] == found["output_tokens"] == 100
    assert found["input_tokens_per_s"] * found["duration_s"] == found["input_tokens"] == 12
    assert found["peak_output_tokens_per_s"] == 70.0  # of the second second
    assert found["chunks_per_s"] == 4.0


def test_tokens_that_are_not_known_are_not_guessed():
    reasons: dict[str, str] = {}
    found = throughput([record_of_times(1, 2, tokens=9), record_of_times(1, 2)], reasons)
    assert found["output_tokens"] is found["output_tokens_per_s"] is None
    assert found["peak_output_tokens_per_s"] is None
    assert set(reasons) == {"output_tokens_per_s", "peak_output_tokens_per_s"}


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.floats(0.05, 12),
    st.data(),
)
def test_a_peak_is_never_below_the_mean(places, total_s, data):
    times = [place * total_s for place in places]
    weights = data.draw(
        st.one_of(
            st.none(),
            st.lists(st.integers(0, 9), min_size=len(times), max_size=len(times)),
        )
    )
    amount = len(times) if weights is None else sum(weights)
    assert peak_per_s(times, total_s, weights) >= amount / total_s * (1 - 1e-9)


def test_counts_failures_and_retries():
    figures = load_figures(two_seconds())
    assert figures["requests"] == {
        "sent": 5, "succeeded": 4, "failed": 1, "interrupted": 0, "retries": 2,
    }  # fmt: skip
    assert figures["failures"] == {"stall": 1}
    assert figures["first_errors"] == {"stall": "it failed: stall"}
    assert figures["distributions"]["e2e_ms"]["count"] == 4, "failures have no latency"


def test_interrupted_requests_are_nobodys_failure():
    figures = load_figures([record_of_times(5, failure="interrupted")])
    assert figures["requests"]["failed"] == 0
    assert figures["requests"]["interrupted"] == 1


def test_goodput_counts_what_kept_every_slo():
    records = two_seconds()
    found = goodput(records, {"ttft": 100, "e2e": 500})
    assert (found["kept"], found["requests_per_s"], found["share"]) == (2, 1.0, 0.4)
    found = goodput([*records, record_of_times(5, sent_at=1.0)], {"tpot": 1000})
    assert (found["kept"], found["not_known"]) == (4, 1)


def test_queue_time_and_rates():
    records = [
        record_of_times(1, tokens=1, sent_at=at + 0.25, scheduled_at=at) for at in (0.0, 0.5, 1.0)
    ]
    records.append(record_of_times(1, tokens=1, sent_at=9.0, turn=1))  # no arrival
    assert queue_ms(records[0]) == 250.0
    rates = load_figures(records, asked_per_s=2.5)["rates"]
    assert rates == {"asked_per_s": 2.5, "scheduled_per_s": 2.0, "sent_per_s": 2.0}


def test_the_rate_of_bursts_is_not_raised_by_the_first():
    records = [
        record_of_times(1, tokens=1, sent_at=at + 0.001 * place, scheduled_at=at)
        for at in (0.0, 1.0, 2.0)
        for place in range(10)
    ]
    rates = load_figures(records, asked_per_s=10.0)["rates"]
    assert rates["scheduled_per_s"] == 10.0
    assert rates["sent_per_s"] == pytest.approx(10.0, rel=0.01)


def test_categories_have_a_row_each():
    records = [
        record_of_times(10, 20, tokens=2, category="math"),
        record_of_times(30, 60, tokens=4, category="math"),
        record_of_times(50, failure="stall", category="code"),
    ]
    rows = load_figures(records)["categories"]
    assert rows["math"]["ttft_ms"] == 20
    assert rows["math"]["tpot_ms"] == 10
    assert rows["math"]["output_tokens"] == 6
    assert (rows["code"]["failed"], rows["code"]["ttft_ms"]) == (1, None)
    assert load_figures([record_of_times(1, tokens=1)])["categories"] == {}


def test_nothing_is_no_figure():
    figures = load_figures([])
    assert set(figures["distributions"].values()) == {None}
    assert figures["throughput"]["requests_per_s"] == 0.0
    assert figures["queue_ms"] is None


def test_distributions_have_percentiles_and_intervals():
    found = distribution(np.arange(1.0, 102.0))
    assert (found["p50"], found["p90"], found["p99"], found["mean"]) == (51, 91, 100, 51)
    low, high = found["p50_ci95"]
    assert 35 < low < 51 < high < 67
    assert distribution([3.0])["p50_ci95"] is None
    assert distribution([1.0, 2.0], independent=False)["p50_ci95"] is None


def test_quantile_intervals_are_those_of_resampling():
    values = np.random.default_rng(5).exponential(size=40)
    for quantile in (0.5, 0.9):
        drawn = bootstrap_interval(
            values, lambda x, q=quantile: np.quantile(x, q, axis=-1), method="percentile",
            resamples=20_000,
        )  # fmt: skip
        found = quantile_interval(values, quantile, resamples=20_000)
        spread = np.ptp(values)
        assert found == pytest.approx(drawn, abs=0.03 * spread)


def test_quantile_intervals_cover_the_truth():
    """95 % intervals of the median of uniform numbers: the truth is in about 95 of 100."""
    rng = np.random.default_rng(2)
    inside = 0
    for seed in range(300):
        low, high = quantile_interval(rng.uniform(size=60), 0.5, seed=seed, resamples=500)
        inside += low <= 0.5 <= high
    assert 0.91 <= inside / 300 <= 0.98


def test_quantile_intervals_refuse_what_is_none():
    assert quantile_interval([1.0], 0.5) is None
    assert quantile_interval([2.0, 2.0, 2.0], 0.99) == (2.0, 2.0)
    with pytest.raises(ValueError, match="quantile"):
        quantile_interval([1.0, 2.0], 1.0)
