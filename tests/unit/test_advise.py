"""`inferlab advise`: break-even by hand, intervals, the command's words and errors."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest

from inferlab import SpeculativePipeline, cli
from inferlab.benchmarks.advice import (
    LIKELY,
    Setting,
    Weigher,
    acceptance_of,
    settings_of,
    speedup_interval,
)
from inferlab.benchmarks.advice_report import draw, report
from inferlab.benchmarks.advisor import Advisor
from inferlab.benchmarks.batches import batches_to_time, full_batches, mixed_batches
from inferlab.config import SpecdecConfig
from inferlab.errors import UsageError
from inferlab.specdec.costs import CostModel, DraftCosts, StepCosts
from inferlab.specdec.recorded import FIRST, PHASES, read_recording
from inferlab.specdec.replay import Replay

COSTS = CostModel(
    StepCosts((1, 5), (4.0, 6.0), per_sequence=1.0),
    DraftCosts(((1, ((0, 0.0), (4, 2.0))), (2, ((0, 0.0), (4, 4.0))))),
)
"""4 ms a row alone, 0.5 ms each row more, 1 ms each sequence more; 0.5 ms a drafted token."""
FAKE = ("--impl", "fake", "--draft-mode", "vanilla,ngram", "--max-tokens", "21", "--prompt", "ab")


@pytest.fixture(autouse=True)
def no_costs(monkeypatch):
    monkeypatch.setattr(SpeculativePipeline, "costs", lambda self: COSTS)


def run(*words):
    return cli.main(["advise", *words])


# --- break-even ---------------------------------------------------------------------------------


def test_the_acceptance_of_a_length_by_hand():
    assert acceptance_of(1.5, 1) == pytest.approx(0.5)
    assert acceptance_of(1.75, 2) == pytest.approx(0.5)  # 1 + 1/2 + 1/4
    assert acceptance_of(5.0, 4) == pytest.approx(1.0)
    assert acceptance_of(0.9, 3) == 0.0, "a step that takes less needs no acceptance"
    assert acceptance_of(3.01, 2) is None
    with pytest.raises(ValueError, match="levels is 0; it must be at least 1"):
        acceptance_of(1.0, 0)


@pytest.fixture
def replays(tmp_path):
    """Drafts that all agree, four of them in each step, whose steps took just what COSTS says."""
    pipeline = SpeculativePipeline(implementation="fake", k=4, record=tmp_path)
    pipeline.generate([[5, 6, 7], [8, 9, 10]], max_tokens=21)
    recording = read_recording(tmp_path)
    c = dict(recording.columns)
    ms = np.zeros((recording.num_steps, len(PHASES)), np.float32)
    decoding = c["step.kind"] != FIRST
    assert c["step.rows"].tolist() == [2] * recording.num_steps
    ms[decoding, PHASES.index("draft")] = 4.0
    ms[decoding, PHASES.index("verify")] = COSTS.step.ms(2, 5, 0)
    ms[~decoding, PHASES.index("prefill")] = COSTS.step.ms(2, 3, 1.5)
    recording = replace(recording, columns={**c, "step.ms": ms})
    return Replay(recording), Replay(recording, CostModel(COSTS.step))


def test_break_even_by_hand(replays):
    drafted, plain = replays
    plain.times.step_scale = plain.times.reading_scale = drafted.times.reading_scale
    (found,) = Weigher("vanilla", drafted, plain, [Setting("vanilla", 4)]).weigh(2)
    # Of 21 tokens the first comes from reading: 2 x 3 rows, 4 + 5 x 0.5 + 1 ms. Drafted, four
    # steps of five tokens follow, with 10 rows: 4 + 9 x 0.5 + 1, and 4 ms of drafting; plainly
    # twenty, with 2 rows: 4 + 0.5 + 1.
    assert found.speedup == pytest.approx((7.5 + 20 * 5.5) / (7.5 + 4 * 13.5))
    assert found.tokens_per_second == pytest.approx(42 / (7.5 + 4 * 13.5) * 1e3)
    assert (found.length, found.acceptance, found.exact) == (5.0, pytest.approx(1.0), 1.0)
    assert found.needed_length == pytest.approx(5 / found.speedup)
    needed = found.needed_acceptance
    assert sum(needed**level for level in range(5)) == pytest.approx(found.needed_length)
    assert found.interval == pytest.approx((found.speedup, found.speedup)), "nothing is unknown"
    assert found.pays


def test_fewer_levels_and_other_batches_are_cut_from_the_record(replays):
    weigher = Weigher("vanilla", *replays)
    assert [s.levels for s in weigher.settings] == [1, 2, 3, 4]
    lengths = [f.length for f in weigher.weigh(1)]  # 20 tokens in 10, 7, 6 and 4 steps
    assert lengths == pytest.approx([2.0, 20 / 7, 20 / 6, 5.0])
    assert weigher.best(1).setting.levels == 4
    assert weigher.best(3).batch == 3, "the texts fill it up"


def test_of_many_settings_those_that_may_be_fastest_are_replayed(replays, monkeypatch):
    settings = [Setting("vanilla", levels, nodes) for levels in (1, 2, 3, 4) for nodes in (1, 2, 4)]
    weigher = Weigher("vanilla", *replays, settings)
    fastest = max(weigher.weigh(1), key=lambda found: found.speedup)
    asked = []
    run = weigher._drafted.run
    monkeypatch.setattr(
        weigher._drafted, "run", lambda *given, **named: asked.append(1) or run(*given, **named)
    )
    assert weigher.best(1).speedup == fastest.speedup
    assert len(asked) == LIKELY < len(settings)


def test_an_interval_has_both_errors():
    assert speedup_interval(2.0, [0.5], 0.0) == (2.0, 2.0)
    low, high = speedup_interval(2.0, [0.5], 0.1)
    assert low * high == pytest.approx(4.0)
    assert math.log(high / 2) == pytest.approx(1.96 * 2**0.5 * 0.1 / 0.674, rel=1e-3)
    wider = speedup_interval(2.0, [0.3, 0.4, 0.5, 0.6, 0.7], 0.1)
    assert wider[0] < low < high < wider[1]


def test_settings_are_what_the_record_can_say_something_of():
    def of(mode, form, levels, nodes):
        return settings_of(
            mode, {"K": levels, "tree": {"form": form, "levels": levels, "nodes": nodes}}
        )

    assert of("vanilla", "chain", 4, 4) == [Setting("vanilla", k) for k in (1, 2, 3, 4)]
    assert of("ensemble", "merged", 6, 31) == [Setting("ensemble", 6)]
    grown = of("eagle", "grown", 3, 5)
    assert (grown[0], grown[-1]) == (Setting("eagle", 1, 2), Setting("eagle", 3, 5))
    assert Setting("eagle", 3, 2) not in grown, "three levels have three nodes at least"
    assert of("vanilla", "chain", 0, 0) == []
    assert str(Setting("eagle", 3, 8)) == "--draft-mode eagle --K 3 --tree-nodes 8"


def test_batches_are_full_and_hold_all_prompts():
    assert full_batches("abc", 2) == [["a", "b"], ["c", "a"]]
    assert full_batches("ab", 4) == [["a", "b", "a", "b"]]
    mixed = mixed_batches("abcdefgh", (1, 4))
    assert [len(group) for group in mixed] == [4, 1, 1, 1, 1]
    assert sorted(text for group in mixed for text in group) == list("abcdefgh")
    assert len(batches_to_time("abcdefgh", 8)) == 4


# --- the advisor --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake():
    return SpecdecConfig(implementation="fake", max_new_tokens=20, iterations=1)


def test_modes_without_weights_are_left_out_and_named(fake):
    advisor = Advisor(fake)
    assert advisor.modes == ["vanilla", "ngram", "recycling"]
    assert set(advisor.left_out) >= {"self", "medusa", "eagle", "medusa-lite", "eagle-lite"}
    assert all(advisor.left_out.values())
    with pytest.raises(ValueError, match="draft_mode 'eagle'"):
        Advisor(fake, ["eagle"])


def test_heads_of_another_target_are_not_tried(tmp_path, fake):
    from inferlab.benchmarks.advisor import _missing

    config = SpecdecConfig(base_model="some/model")
    assert "--draft-model" in _missing(config, "vanilla")
    assert "--draft-mode medusa --heads" in _missing(config, "medusa")
    assert "EAGLE head" in _missing(config, "ensemble")
    assert _missing(config, "ngram") is None
    given = SpecdecConfig(base_model="some/model", draft_model="other/draft")
    assert _missing(given, "vanilla") is None
    assert _missing(fake, "vanilla") is None


@pytest.mark.parametrize(
    ("changes", "modes", "sizes", "message"),
    [
        ({"policy": "typical"}, None, (1,), "--policy: typical cannot be replayed"),
        ({}, ["vanila"], (1,), "--draft-mode: 'vanila' is unknown; known are vanilla, "),
        ({}, None, (1, 64), r"--batch: 64 is not allowed; must be from 1 to max_batch \(32\)"),
        ({}, None, (0,), "--batch: 0 is not allowed"),
    ],
)
def test_what_cannot_be_advised_is_refused(fake, changes, modes, sizes, message):
    with pytest.raises(UsageError, match=message):
        Advisor(fake.model_copy(update=changes), modes, sizes)


def test_without_modes_it_says_to_decode_plainly(fake):
    advisor = Advisor(fake, ["ngram"], [1])
    advisor.modes = []
    advice = advisor.run(["ab"])
    assert "batch 1: decode plainly: there is nothing to draft with" in report(advice)
    assert advisor.verify(advice, ["ab"]) == {}


# --- the command --------------------------------------------------------------------------------


def test_it_writes_json_a_plot_and_tables(capsys, tmp_path):
    file, plot = tmp_path / "a.json", tmp_path / "a.svg"
    words = ("--batch", "1,2", "--json", str(file), "--plot", str(plot), "--verify")
    assert run(*FAKE, *words, "--iterations", "1") == 0
    shown = capsys.readouterr().out
    assert "batch 1: " in shown
    assert "needed" in shown
    assert "predicted" in shown
    value = json.loads(file.read_text())
    assert list(value["best"]) == list(value["verified"]) == ["1", "2"]
    assert {row["draft_mode"] for row in value["best"]["1"]} == {"vanilla", "ngram"}
    assert [row["batch"] for row in value["curve"]["vanilla"]] == [1, 2, 4, 8, 16]
    for row in value["best"]["1"]:
        assert row["ci95"][0] <= row["speedup"] <= row["ci95"][1]
        assert row["pays"] == (row["speedup"] >= 1.05)
    assert plot.read_text().startswith("<?xml")


def test_a_mode_that_never_pays_is_drawn(capsys, tmp_path, fake):
    advisor = Advisor(fake, ["vanilla"], [1])
    advice = advisor.run(["ab"])
    never = [replace(f, needed_acceptance=None) for f in advice.curve["vanilla"]]
    assert draw(replace(advice, curve={"vanilla": never}), tmp_path / "a.png")[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--K", "3"), "--K: has no meaning here: how much to draft is what is advised; --max-k"),
        (("--controller", "cost"), "--controller: has no meaning here"),
        (("--tree-nodes", "3"), "--tree-nodes: has no meaning here"),
        (("--iterations", "2"), "--iterations: is of --verify; give that too"),
        (("--plot", "a.gif"), "--plot: a.gif must end in .svg or .png or .pdf"),
        (("--plot", "nowhere/a.svg"), "--plot: nowhere/a.svg: its directory does not exist"),
        (("--json", "nowhere/a.json"), "--json: nowhere/a.json: its directory does not exist"),
        (("--batch", "1,x"), "argument --batch: '1,x' is not a list of numbers: 1,4,16"),
        (("--heads", "h"), "--heads: names the heads of --draft-mode medusa or eagle; give both"),
        (("--draft-mode", "none"), "--draft-mode: 'none' is unknown"),
    ],
)
def test_errors_name_the_flag_and_the_remedy(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = run("--impl", "fake", "--prompt", "ab", *words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_prompt_that_cannot_be_run_is_named(capsys, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    assert run("--impl", "fake", "--prompts", str(file)) == 2
    assert f"error: {file}:2: prompt is empty" in capsys.readouterr().err
    file.write_text('{"prompt": "a"}\n{"prompt": "' + "ab " * 9000 + '"}\n')
    assert run("--impl", "fake", "--prompts", str(file)) == 2
    assert f"error: {file}:2: prompt (" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["advise"], ["calibrate", "--reliability"]])
def test_what_a_figure_needs_is_asked_for_before_the_work(capsys, monkeypatch, tmp_path, command):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main([*command, "--plot", str(tmp_path / "x.svg")]) == 2
    error = "error: --plot: matplotlib is missing; pip install matplotlib\n"
    assert capsys.readouterr().err == error
