"""`--profile`: a trace that Perfetto reads, with the engine's phases where the operations are."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from inferlab.cli import main
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.profiling import PhaseTimeline, Span, profiled, tiled
from inferlab.specdec.step import PHASES, Clock

REAL = {"max_new_tokens": 12, "controller": "fixed"}


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A trace, the result of the run, and what the engine's clock told of it."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    pipeline = SpeculativePipeline(**REAL)
    pipeline.generate("def add(a, b):")
    before = dict(pipeline.engine.clock.totals)
    with profiled(pipeline.engine, path):
        result = pipeline.generate("def add(a, b):")
    spent = {phase: ms - before[phase] for phase, ms in pipeline.engine.clock.totals.items()}
    assert pipeline.engine.clock.timeline is None
    return json.loads(path.read_text()), result, spent


def phases_of(trace):
    return [event for event in trace["traceEvents"] if event.get("cat") == "phase"]


def test_a_trace_is_of_complete_events_with_units_of_microseconds(traced):
    trace, *_ = traced
    for event in trace["traceEvents"]:
        assert isinstance(event["ph"], str)
        if event["ph"] == "X":
            assert {"name", "pid", "tid"} <= set(event)
            assert event["ts"] >= 0
            assert event["dur"] >= 0
    assert any(event.get("name", "").startswith("aten::") for event in trace["traceEvents"])
    assert not {"host_name", "traceName"} & set(trace), "nothing tells whose machine it was"


def test_phases_have_a_track_of_their_own(traced):
    trace, *_ = traced
    (pid,) = {event["pid"] for event in phases_of(trace)}
    own = [event for event in trace["traceEvents"] if event.get("pid") == pid]
    named = {e["name"]: e["args"] for e in own if e["ph"] == "M"}
    assert named["process_name"] == {"name": "inferlab engine"}
    assert named["thread_name"] == {"name": "phases"}
    assert {e["cat"] for e in own if e["ph"] == "X"} == {"phase"}


def test_phases_lie_end_to_end_and_add_up_to_what_the_clock_says(traced):
    trace, result, spent = traced
    events = phases_of(trace)
    for one, other in pairwise(events):
        assert other["ts"] == pytest.approx(one["ts"] + one["dur"], abs=1.0)
    sums = {}
    for event in events:
        sums[event["name"]] = sums.get(event["name"], 0.0) + event["dur"] / 1e3
    assert set(sums) == {*PHASES, "rest"}
    for phase in PHASES:
        assert sums[phase] == pytest.approx(spent[phase], rel=0.02, abs=0.01)
        assert sums[phase] == pytest.approx(result["timings_ms"][phase], rel=0.02, abs=0.01)
    whole = events[-1]["ts"] + events[-1]["dur"] - events[0]["ts"]
    assert sum(sums.values()) == pytest.approx(whole / 1e3, rel=0.02)


def test_phases_and_operations_are_on_one_clock(monkeypatch, tmp_path):
    """What the profiler saw within the target's forward lies within the phases that have one."""
    pipeline = SpeculativePipeline(**REAL)
    forward = pipeline.target.forward

    def probed(*arguments):
        with torch.profiler.record_function("probe"):
            return forward(*arguments)

    monkeypatch.setattr(pipeline.target, "forward", probed)
    with profiled(pipeline.engine, tmp_path / "t.json"):
        pipeline.generate("def add(a, b):")
    trace = json.loads((tmp_path / "t.json").read_text())
    with_forward = [e for e in phases_of(trace) if e["name"] in ("prefill", "verify")]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in with_forward]
    probes = [e for e in trace["traceEvents"] if e["name"] == "probe" and e["ph"] == "X"]
    probes = [(e["ts"], e["ts"] + e["dur"]) for e in probes if e.get("cat") == "user_annotation"]
    assert len(probes) == len(spans) > 1
    slack_us = 100  # from a mark of the one clock to that of the other
    for (begin, end), (first, last) in zip(spans, sorted(probes), strict=True):
        assert begin - slack_us <= first
        assert last <= end + slack_us


def test_gaps_are_the_rest():
    spans = [Span("draft", 0.0, 1.0), Span("verify", 1.0, 2.0), Span("draft", 2.5, 3.0)]
    assert tiled(spans) == [*spans[:2], Span("rest", 2.0, 2.5), spans[2]]


def test_phases_are_ranges_of_nvtx(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("end"))
    clock = Clock(timeline=PhaseTimeline(nvtx=True))
    clock.start("commit")
    clock.lap("commit", "draft")
    clock.lap("draft")
    clock.lap("commit")  # nobody knew that it would be
    clock.start("draft")
    clock.timeline.close()
    assert told == ["commit", "end", "draft", "end", "draft", "end"]
    assert [span.phase for span in clock.timeline.spans] == ["commit", "draft", "commit"]


def test_nvtx_is_left_alone_without_cuda(traced, monkeypatch):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", fail)
    clock = Clock(timeline=PhaseTimeline(nvtx=False))
    clock.start("draft")
    clock.lap("draft", "verify")


def test_a_run_that_fails_leaves_the_engine_unwatched(tmp_path):
    pipeline = SpeculativePipeline(implementation="fake", max_new_tokens=4)
    with pytest.raises(RuntimeError, match="nothing"), profiled(pipeline.engine, tmp_path / "t"):
        raise RuntimeError("nothing")
    assert pipeline.engine.clock.timeline is None


FAKE = ["--impl", "fake", "--max-tokens", "6"]


def test_the_commands_write_it(tmp_path, capsys):
    for words in (["specdec"], ["bench", "--mode", "specdec", "--iterations", "1"]):
        path = tmp_path / f"{words[0]}.json"
        assert main([*words, *FAKE, "--prompt", "x", "--profile", str(path), "--json"]) == 0
        assert {e["name"] for e in phases_of(json.loads(path.read_text()))} >= {"draft", "verify"}
    stats = json.loads(capsys.readouterr().out.splitlines()[1])
    assert len(stats["runs"]) == 1, "the profiled run counts nowhere"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "--mode", "local"], "--profile: has no meaning in --mode local"),
        (["bench", "--modes", "ngram"], "--profile: has no meaning with --modes"),
        (["bench", "--quantization-matrix"], "--profile: has no meaning with"),
        (["specdec", *FAKE], "--profile: no/such/dir/t: its directory does not exist"),
        (["bench", "--mode", "specdec", *FAKE], "--profile: no/such/dir/t: its directory"),
    ],
)
def test_what_cannot_be_profiled(words, message, capsys):
    assert main([*words, "--prompt", "x", "--profile", "no/such/dir/t"]) == 2
    assert message in capsys.readouterr().err


def test_a_trace_does_not_take_the_place_of_the_results(tmp_path, capsys):
    path = str(tmp_path / "r.json")
    for words in (["specdec", "--output", path], ["bench", "--mode", "specdec", "--output", path]):
        assert main([*words, *FAKE, "--prompt", "x", "--profile", path]) == 2
        assert "--profile: " in (said := capsys.readouterr().err)
        assert "is a file of --output, too" in said
