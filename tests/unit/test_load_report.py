"""Reports of loads on a server and of sweeps, and comparisons of them, from their JSON."""

from __future__ import annotations

import copy
import json

import pytest

from helpers.loads import record_of_times
from inferlab.benchmarks.compare import compare_results
from inferlab.benchmarks.result_files import report_of
from inferlab.load.metrics import load_figures
from inferlab.load.recomputed import recomputed_load, recomputed_sweep
from inferlab.load.sweep import level_of
from inferlab.records import Exchange, RequestRecord
from inferlab.reports.html import to_html
from inferlab.reports.model import Lines
from inferlab.reports.terminal import print_report

ENVIRONMENT = {"time": "now", "torch": "2"}


def answered(index, begin_s, latency_ms, error=None):
    """A streamed answer of three chunks, a third of its time apart."""
    times = [] if error else [latency_ms / 3, latency_ms * 2 / 3, latency_ms]
    exchange = Exchange(server="http://s", endpoint="chat", stream=True, attempts=1,
                        status_code=None if error else 200, elapsed_ms=latency_ms)  # fmt: skip
    return RequestRecord(
        source="http", model="m", prompt=f"<b>{index}</b>", num_tokens=0 if error else 5,
        counted_by=None if error else "usage", error=error, started_at=1e9 + begin_s,
        latency_ms=latency_ms, first_token_ms=times[0] if times else None, text_times_ms=times,
        exchange=exchange,
    ).as_json()  # fmt: skip


def load(*records, failures=None):
    quantiles = {"count": 2, "mean": 40.0, "std": 1.0, "min": 1.0, "max": 60.0, "p50": 41.5,
                 "p90": 50.0, "p95": 55.0, "p99": 59.0, "p50_ci95": (30.0, 50.0),
                 "p90_ci95": None, "p95_ci95": None, "p99_ci95": None}  # fmt: skip
    told = None if failures else quantiles
    drafts = {"drafts": 10, "accepted_at": [8, 4, 1], "drafted_tokens": 30, "accepted_tokens": 13,
              "length": 1.3, "length_with_bonus": 2.3, "note": None}  # fmt: skip
    return {
        "mode": "http", "server": "http://s<u>", "endpoint": "chat", "model": "m", "proxy": None,
        "environment": ENVIRONMENT, "interrupted": False,
        "settings": {"arrivals": {"kind": "closed", "rate": None}, "concurrency": 2, "extra": {},
                     "processes": 1},
        "requests": {"sent": len(records), "succeeded": len(records), "failed": 0,
                     "interrupted": 0, "retries": 0},
        "failures": failures or {}, "first_errors": {"refused": "no server <i>"}, "warnings": {},
        "distributions": {"ttft_ms": told, "itl_ms": None},
        "not_known": {"itl_ms": "chunks do not tell"},
        "throughput": {"duration_s": 2.0, **dict.fromkeys(
            ("requests_per_s", "peak_requests_per_s", "peak_chunks_per_s"), 2.0), **dict.fromkeys(
            ("output_tokens_per_s", "input_tokens_per_s", "peak_output_tokens_per_s"))},
        "goodput": None, "rates": {"asked_per_s": None}, "queue_ms": None, "recount": None,
        "client": {"loop_lag_ms": None, "cpu_share": [0.5]},
        "categories": {"a|b": dict.fromkeys(
            ("requests", "failed", "output_tokens", "ttft_ms", "tpot_ms", "e2e_ms",
             "tokens_per_chunk"), 3)},
        "acceptance": {"of_server": drafts, "of_answers": None},
        "records": list(records),
    }  # fmt: skip


GOOD = load(answered(0, 0.0, 60.0), answered(1, 0.03, 90.0), answered(2, 0.5, 30.0))


def test_a_load_has_its_tables_and_plots():
    report = report_of(GOOD)
    said, distributions, categories = report.parts[0], *report.tables
    assert distributions.rows == [
        ("TTFT, ms", "40", "41.5", "50", "55", "59", "60", "30 to 50", "-", "2")
    ]
    assert "throughput: 2 requests/s, not known output tokens/s, not known input tokens/s" in (
        said.lines
    )
    assert any("13 of 30 tokens accepted; length 1.3" in line for line in said.lines)
    assert categories.rows[0][0] == "a|b"
    plots = {plot.title: plot for plot in report.plots}
    assert list(plots) == ["latency, ms", "TTFT, ms", "TPOT, ms", "ms per token",
                           "Requests in flight",
                           "Acceptance by position, told by the server"]  # fmt: skip
    assert [x for x, _ in plots["TTFT, ms"].series[0].points[1:]] == [10.0, 20.0, 30.0]
    assert [x for x, _ in plots["TPOT, ms"].series[0].points[1:]] == pytest.approx([5, 10, 15])
    assert plots["TTFT, ms"].source == "records[].first_token_ms"
    flight = plots["Requests in flight"].series[0].points
    assert [y for _, y in flight] == [0, 1, 2, 1, 0, 1, 0]
    assert [x for x, _ in flight][1:4] == pytest.approx([0.0, 0.03, 0.06])
    (accepted,) = plots["Acceptance by position, told by the server"].series
    assert accepted.points == [(1.0, 0.8), (2.0, 0.4), (3.0, 0.1)]
    assert "<u>" not in to_html(report)


def test_many_requests_make_a_small_plot_with_all_peaks():
    stats = load(*(answered(i, i * 0.01, 25.0 + (500 if i == 1234 else 0)) for i in range(3000)))
    plot = next(p for p in report_of(stats).plots if p.title == "Requests in flight")
    (series,) = plot.series
    assert len(series.points) <= 800
    assert max(y for _, y in series.points) == 4
    assert {y for _, y in series.points} >= {3, 4}


def test_a_load_that_failed_tells_why():
    stats = load(answered(0, 0.0, 1.0, error="no"), failures={"refused": 1})
    report = report_of(stats)
    alarm = report.parts[1]
    assert isinstance(alarm, Lines)
    assert alarm.alarm
    assert alarm.lines == ["failed, refused: 1; the first: no server <i>"]
    assert "no server &lt;i&gt;" in to_html(report)
    assert [table.columns[0] for table in report.tables] == ["category"]


def sweep(*loads):
    levels = [
        {"level": 2.0**i, "requests_per_s": 10.0 + i, "output_tokens_per_s": 100.0 + 50 * i,
         "gain": None if i == 0 else 0.5, "ttft_p50_ms": 5.0 + i, "ttft_p99_ms": 9.0,
         "tpot_p50_ms": None, "tpot_p99_ms": None, "goodput_per_s": None, "failed": 0}
        for i in range(len(loads))
    ]  # fmt: skip
    return {"mode": "http", "of": "concurrency", "stopped": "saturated", "interrupted": False,
            "levels": levels, "loads": list(loads)}  # fmt: skip


def test_a_sweep_has_its_curve(capsys):
    stats = sweep(GOOD, GOOD, load(answered(0, 0.0, 1.0, error="no"), failures={"refused": 1}))
    report = report_of(stats)
    (table,) = report.tables
    assert [row[0] for row in table.rows] == ["1", "2", "4"]
    assert table.rows[1][-2:] == ("+50.0%", "0")
    curve = report.plots[0]
    assert curve.title == "TTFT against throughput"
    assert curve.series[0].points == [(100.0, 5.0), (150.0, 6.0), (200.0, 7.0)]
    assert report.parts[0].lines == [
        "users 4: failed, refused: 1; the first: no server <i>",
    ]
    print_report(report)
    assert "TTFT p99, ms" in capsys.readouterr().out


def test_loads_are_compared_by_prompt():
    fast = load(*(answered(i, i, 100.0 + i) for i in range(9)))
    slow = load(*(answered(i, i, 150.0 + i) for i in range(9)))
    found = compare_results(fast, slow)
    assert found["modes"]["http"]["metrics"]["ttft_ms"]["verdict"] == "slower"
    assert any(text.startswith("http: TTFT, ms") for text in found["regressions"])
    assert compare_results(fast, copy.deepcopy(fast))["regressions"] == []
    other = copy.deepcopy(slow)
    other["settings"]["concurrency"] = 8
    (difference,) = compare_results(fast, other)["settings"]
    assert difference == {"name": "concurrency", "a": "2", "b": "8"}
    assert compare_results(sweep(fast, fast), sweep(fast, slow))["modes"].keys() == {
        "concurrency 1", "concurrency 2",
    }  # fmt: skip


def test_answers_that_all_fail_are_a_regression():
    good = load(*(answered(i, i, 100.0 + i) for i in range(3)))
    bad = load(*(answered(i, i, 1.0, error="full") for i in range(3)), failures={"refused": 3})
    assert compare_results(good, bad)["regressions"] == ["3 runs failed, 0 before"]


def test_what_moves_the_cursor_is_shown(capsys):
    stats = load(answered(0, 0.0, 60.0)) | {"model": "m\x1b[31m\x9b"}
    print_report(report_of(stats))
    shown = capsys.readouterr().out
    assert "model: m\\x1b[31m\\x9b" in shown
    assert "\x1b" not in shown


RECORDS = [record_of_times(3, 5, tokens=4, sent_at=at) for at in (0.0, 0.5)]


def stated(**changes):
    """A load as its file has it."""
    return {**load_figures(RECORDS), "records": [r.as_json() for r in RECORDS], **changes}


def test_a_load_from_a_file_has_the_figures_of_its_records():
    stats = stated()
    assert recomputed_load(json.loads(json.dumps(stats))) == (stats, [])
    edited = copy.deepcopy(stats)
    edited["distributions"]["ttft_ms"]["p50"] = 1.0
    edited["throughput"]["output_tokens_per_s"] = 99999.0
    found, differences = recomputed_load(edited)
    assert found == stats
    assert [line.split(" is ")[0] for line in differences] == [
        "distributions.ttft_ms.p50", "throughput.output_tokens_per_s",
    ]  # fmt: skip
    none, differences = recomputed_load(stated(records=[]))
    assert none["requests"]["sent"] == 0
    assert differences


def test_a_sweep_from_a_file_has_the_figures_of_its_records():
    best = stated()["throughput"]["output_tokens_per_s"]
    levels = [level_of(1.0, stated(), None), level_of(2.0, stated(), best)]
    stats = {"levels": levels, "loads": [stated(), stated()]}
    assert recomputed_sweep(json.loads(json.dumps(stats))) == (stats, [])
    levels[1]["requests_per_s"] = 7.0
    assert recomputed_sweep(stats)[1] == [
        f"levels[1].requests_per_s is 7.0 in the file, {levels[0]['requests_per_s']} by its records"
    ]
    with pytest.raises(ValueError, match="has 1 levels of 2 loads"):
        recomputed_sweep(stats | {"levels": levels[:1]})


def test_levels_whose_answers_are_known_to_be_empty_gain_nothing():
    records = [record_of_times(tokens=0, end_ms=4.0, sent_at=at) for at in (0.0, 0.5)]
    empty = {**load_figures(records), "records": [r.as_json() for r in records]}
    assert empty["throughput"]["output_tokens_per_s"] == 0.0
    levels = [level_of(1.0, empty, None), level_of(2.0, empty, 0.0)]
    stats = {"levels": levels, "loads": [empty, empty]}
    assert recomputed_sweep(stats) == (stats, [])
