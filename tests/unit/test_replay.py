"""Recorded runs decoded again: what is said to be exact is what really happens."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from helpers.pairwise import pairwise
from helpers.recordings import PROMPTS, record
from inferlab import SpeculativePipeline, cli
from inferlab.errors import Interrupted, UsageError
from inferlab.specdec.control import Choice, Controller
from inferlab.specdec.controllers import AdaptiveController
from inferlab.specdec.costs import CostModel, DraftCosts, StepCosts
from inferlab.specdec.cuts import Rule
from inferlab.specdec.planner import CostController
from inferlab.specdec.recorded import FIRST, NO_KIND, read_recording
from inferlab.specdec.replay import Replay
from inferlab.specdec.replay_askers import Always, Controlled
from inferlab.specdec.tree import Budget

COSTS = CostModel(
    StepCosts((1, 8, 64), (2.0, 2.5, 6.0), per_key=1e-4), DraftCosts(((1, ((0, 0.1), (8, 4.0))),))
)


@pytest.fixture(autouse=True)
def no_costs(monkeypatch):
    """Measuring them takes a second for each pipeline."""
    monkeypatch.setattr(SpeculativePipeline, "costs", lambda self: COSTS)


@pytest.fixture(scope="module")
def target():
    return SpeculativePipeline(draft_mode="none").target


def walks(result):
    """(request, root) -> accepted, of what is exact."""
    return {
        (request, walked.root): walked.accepted
        for request, of_request in result.by_request.items()
        for walked in of_request
        if walked.exact
    }


# --- as it was recorded -------------------------------------------------------------------------


@pytest.mark.parametrize("draft_mode", ["vanilla", "ngram", "eagle"])
@pytest.mark.parametrize("batch", [1, 4])
def test_what_was_planned_comes_out_exactly(target, tmp_path, draft_mode, batch):
    results, recording = record(tmp_path, draft_mode, target, batch=batch, controller="cost")
    recorded = Replay(recording).recorded()
    assert (recorded.disagree, recorded.covered) == (0, 1)
    assert recorded.tokens == sum(result["num_tokens"] for result in results)
    for request, result in zip(recorded.by_request.values(), results, strict=True):
        assert sum(walked.accepted for walked in request) == result["accepted"]


@pairwise(
    draft_mode=["vanilla", "ngram", "recycling", "eagle", "medusa", "ensemble", "none"],
    temperature=[0.0, 0.8],
    batch=[1, 4],
)
def test_the_recorded_setting_comes_out_exactly(target, tmp_path, draft_mode, temperature, batch):
    results, recording = record(tmp_path, draft_mode, target, batch=batch, temperature=temperature)
    replay = Replay(recording)
    recorded = replay.recorded()
    again = replay.run(Always(replay.about["K"]))
    for found in (recorded, again):
        assert found.disagree == 0
        assert found.covered == 1
        assert found.tokens == sum(result["num_tokens"] for result in results)
        assert found.walks == sum(result["steps"] for result in results)
        assert found.steps == recording.num_steps
        assert found.ms == pytest.approx(float(recording.columns["step.ms"].sum()), rel=1e-4)
        for request, result in zip(found.by_request.values(), results, strict=True):
            accepted = [walked.accepted for walked in request]
            assert sum(accepted) == result["accepted"]
            at = [sum(n > place for n in accepted) for place in range(max(accepted, default=0))]
            assert at == [n for n in result["record"]["speculation"]["stats"]["accepted_at"] if n]
    assert walks(again) == walks(recorded)


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "conf_threshold", "tau": 0.2},
        {"policy": "topk_agree", "agree_k": 3},
        {"policy": "conf_threshold", "tau": 0.4, "tree": [3, 2, 1]},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
        {"min_new_tokens": 20, "presence_penalty": 0.5, "policy": "conf_threshold", "tau": 0.1},
    ],
)
def test_policies_and_filters(target, tmp_path, settings):
    results, recording = record(tmp_path, "vanilla", target, temperature=0.8, **settings)
    replay = Replay(recording)
    assert replay.recorded().disagree == 0
    again = replay.run(Always(replay.about["K"]))
    assert walks(again) == walks(replay.recorded())
    assert again.walks == sum(result["steps"] for result in results)


@pytest.mark.parametrize("policy", ["rejection", "typical"])
def test_policies_that_a_record_cannot_replay(target, tmp_path, policy, capsys):
    results, recording = record(tmp_path, "vanilla", target, temperature=0.8, policy=policy)
    replay = Replay(recording)
    recorded = replay.recorded()
    accepted = sum(walked.accepted for of in recorded.by_request.values() for walked in of)
    assert accepted == sum(result["accepted"] for result in results)
    with pytest.raises(UsageError, match=f"--policy: {policy} cannot be replayed"):
        replay.run(Always(4))
    assert cli.main(["replay", str(tmp_path)]) == 0
    assert cli.main(["replay", str(tmp_path), "--K", "2"]) == 2
    assert f"recorded under {policy}, which can only be replayed as it" in capsys.readouterr().err
    assert replay.run(Always(4), Rule()).walks > 0


# --- other settings -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("draft_mode", "recorded", "asked", "real", "covered"),
    [
        ("vanilla", {"k": 6}, (2, 256), {"k": 2}, 0.8),
        ("vanilla", {"k": 4}, (6, 256), {"k": 6}, 0.3),
        ("vanilla", {"tree": [3, 2, 1]}, (2, 256), {"tree": [3, 2]}, 0.2),
        ("vanilla", {"tree": [3, 2]}, (3, 256), {"tree": [3, 2, 1]}, 0.01),
        ("ngram", {"k": 8}, (3, 256), {"k": 3}, 0.2),
        ("ngram", {"k": 3}, (8, 256), {"k": 8}, 0.2),
        ("eagle", {}, (6, 8), {"tree_nodes": 8}, 0.1),
        ("eagle", {}, (3, 31), {"k": 3}, 0.05),
        ("eagle", {"tree": [2, 2, 1]}, (1, 256), {"tree": [2]}, 0.2),
        ("medusa", {}, (3, 31), {"k": 3}, 0.05),
        ("none", {}, (0, 0), {}, 1.0),
        ("vanilla", {"k": 4}, (0, 256), {"k": 0}, 1.0),
    ],
)
def test_what_is_called_exact_is_what_really_happens(
    target, tmp_path, draft_mode, recorded, asked, real, covered, temperature
):
    """Compared with a run at that setting, root by root, where both have one."""
    _, recording = record(tmp_path / "a", draft_mode, target, temperature=temperature, **recorded)
    _, other = record(tmp_path / "b", draft_mode, target, temperature=temperature, **real)
    replayed = Replay(recording).run(Always(*asked))
    truth = walks(Replay(other).recorded())
    found = walks(replayed)
    common = found.keys() & truth.keys()
    assert {at: found[at] for at in common} == {at: truth[at] for at in common}
    assert replayed.covered >= covered
    assert len(common) >= covered / 2 * len(truth)
    if replayed.covered == 1:
        assert found == truth
    assert replayed.tokens == Replay(other).recorded().tokens


def test_a_recycling_record_covers_no_other_tree(target, tmp_path):
    _, recording = record(tmp_path, "recycling", target)
    replayed = Replay(recording).run(Always(3))
    assert replayed.covered < 0.15, "first tokens, and where a text has no room for drafts"


def test_lossy_policies_on_a_lossless_record(target, tmp_path):
    _, recording = record(tmp_path / "a", "vanilla", target, temperature=0.8)
    settings = {"policy": "conf_threshold", "tau": 0.25}
    _, other = record(tmp_path / "b", "vanilla", target, temperature=0.8, **settings)
    replayed = Replay(recording).run(Always(4), Rule("conf_threshold", 0.25))
    truth = walks(Replay(other).recorded())
    found = walks(replayed)
    common = found.keys() & truth.keys()
    assert {at: found[at] for at in common} == {at: truth[at] for at in common}
    assert len(common) >= len(PROMPTS[:4]), "up to where the texts part"
    assert replayed.covered < 1


def test_batches_come_together_again_as_requests_end(target, tmp_path):
    """A lone request has its recorded steps; four have other steps, of four."""
    _, alone = record(tmp_path / "a", "vanilla", target, k=6, batch=1, temperature=0.8)
    _, together = record(tmp_path / "b", "vanilla", target, k=6, batch=4, temperature=0.8)
    one, four = (Replay(each).run(Always(2)) for each in (alone, together))
    assert one.steps == one.walks > four.steps
    assert four.ms < one.ms


# --- controllers --------------------------------------------------------------------------------


def test_a_controller_that_hears_no_times_decides_as_it_did(target, tmp_path):
    settings = {"controller": "adaptive", "max_k": 6, "target_acceptance": 0.5}
    _, recording = record(tmp_path, "vanilla", target, temperature=0.8, **settings)
    replay = Replay(recording)
    asker = Controlled(AdaptiveController(1, 6, 0.5), replay.about)
    replayed = replay.run(asker)
    assert replayed.covered == 1
    assert walks(replayed) == walks(replay.recorded())
    assert replayed.ms == pytest.approx(replay.recorded().ms)


class Watching(Controller):
    """Asks for what it is told, and keeps what it hears."""

    max_k = 4

    def __init__(self):
        self.asked, self.heard = [], []

    def choose(self, outlook):
        self.asked.append((outlook.batch_size, outlook.ladder))
        return Choice(Budget(3, 200))

    def observe(self, step):
        self.heard.append(step)

    def describe(self, since=None):
        return {"controller": "watching"}


def test_a_controller_hears_of_its_steps_what_the_engine_would_tell(target, tmp_path):
    real = Watching()
    _, recording = record(tmp_path, "eagle", target, controller=real, batch=4)
    replay = Replay(recording)
    again = Watching()
    replayed = replay.run(Controlled(again, replay.about))
    assert replayed.covered == 1
    assert [size for size, _ in again.asked] == [size for size, _ in real.asked]
    assert again.asked[0][1] == tuple(real.asked[0][1])
    for mine, true in zip(again.heard, real.heard, strict=True):
        assert mine[:2] == true[:2]
        assert mine.accepted == true.accepted
        assert mine.depths == true.depths
        assert mine.step_ms == pytest.approx(true.step_ms, rel=0.5, abs=5)


class Choosy(Watching):
    """Has drafted, and keeps, what is surer than a kind."""

    max_k = 8

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.told = []

    def choose(self, outlook):
        return Choice(Budget(8, 8), judge=self)

    def examined(self, requests, sure, right):
        return True

    def followed(self, requests, kinds, accepted):
        self.told += [(list(k), list(a)) for k, a in zip(kinds, accepted, strict=True) if k]

    def goes_on(self, requests, kinds):
        return max(kinds) >= self.least

    def keep(self, requests, kinds):
        return [sum(kind >= self.least for kind in of) for of in kinds]


@pytest.mark.parametrize("draft_mode", ["vanilla", "ngram"])
@pytest.mark.parametrize("least", [2, 5, 9])
def test_judges_see_in_a_replay_what_they_see_in_the_engine(target, tmp_path, draft_mode, least):
    settings = {"temperature": 0.8, "max_tokens": 60}
    _, recording = record(tmp_path / "a", draft_mode, target, k=8, **settings)
    real = Choosy(least)
    _, other = record(tmp_path / "b", draft_mode, target, controller=real, **settings)
    replay = Replay(recording)
    again = Choosy(least)
    replayed = replay.run(Controlled(again, replay.about))
    truth, found = walks(Replay(other).recorded()), walks(replayed)
    common = found.keys() & truth.keys()
    assert len(common) > 0.25 * len(truth)
    assert {at: found[at] for at in common} == {at: truth[at] for at in common}
    assert len(again.heard) == pytest.approx(len(real.heard), rel=0.1)
    rows, expected = (sum(step.rows for step in of.heard) for of in (again, real))
    assert rows == pytest.approx(expected, rel=0.1)
    if draft_mode == "ngram":
        assert len(again.told) == pytest.approx(len(real.told), rel=0.2)
        assert all(len(accepted) <= len(kinds) for kinds, accepted in again.told)


class Keeping(Choosy):
    """Keeps all, of budgets that change."""

    def __init__(self):
        super().__init__(0)
        self.asks = 0

    def choose(self, outlook):
        self.asks += 1
        judge = self if self.asks % 3 else None
        return Choice(Budget(1 + self.asks % 3, 2), judge=judge)


def test_what_a_judge_hears_of_trees_fits(target, tmp_path):
    """Within a recorded walk other branches are not known: another tree stands in there."""
    _, recording = record(tmp_path, "ngram", target, tree=[3, 2, 1], max_tokens=60)
    judge = Keeping()
    Replay(recording).run(Controlled(judge, Replay(recording).about))
    assert len(judge.told) > 20
    assert all(max(accepted, default=0) <= len(kinds) for kinds, accepted in judge.told)
    assert all(type(kinds) is type(accepted) is list for kinds, accepted in judge.told)


def test_recordings_of_which_some_steps_had_a_judge_of_their_own(target, tmp_path):
    """Python's judges are not listened to."""
    for mode in ("ngram", "vanilla"):
        _, recording = record(tmp_path / mode, mode, target, controller=Keeping(), max_tokens=60)
        kinds = recording.columns["node.kind"][recording.columns["node.rank"] > 0]
        assert 0 < (kinds == NO_KIND).sum() < len(kinds)
        with np.errstate(all="raise"):
            replay = Replay(recording)
        judge = Keeping()
        assert replay.run(Controlled(judge, replay.about)).tokens == replay.recorded().tokens
        assert all(accepted == [] for kinds, accepted in judge.told if not kinds)


def test_a_k_beyond_what_the_drafter_has_is_not_recorded(target, tmp_path):
    _, recording = record(tmp_path, "medusa", target, k=9)
    replay = Replay(recording)
    assert replay.about["K"] == replay.levels < 9
    assert walks(replay.run(Always(replay.about["K"]))) == walks(replay.recorded())


def test_a_drafter_that_says_nothing_of_its_nodes_has_no_judge(target, tmp_path):
    _, recording = record(tmp_path, "eagle", target)
    assert np.all(recording.columns["node.kind"] == NO_KIND)
    assert Replay(recording).stand_ins == []


def test_a_controller_that_sleeps_is_not_asked(target, tmp_path):
    class Sleepy(Watching):
        def choose(self, outlook):
            super().choose(outlook)
            return Choice(Budget(0, 0), steps=4)

        def rested(self, batch_size, steps_ms, heard):
            self.heard += [batch_size] * len(steps_ms)

    _, recording = record(tmp_path, "vanilla", target, prompts=PROMPTS[:1], max_tokens=41)
    replay = Replay(recording)
    asker = Sleepy()
    assert replay.run(Controlled(asker, replay.about)).steps == 41
    assert len(asker.asked) == 10, "of forty steps behind the first token"
    assert len(asker.heard) == 40


def test_the_cost_controller_runs_on_the_virtual_clock(target, tmp_path):
    _, recording = record(tmp_path, "vanilla", target, max_tokens=100)
    dear = CostModel(StepCosts((1, 2), (1.0, 50.0)))
    cheap = CostModel(StepCosts((1, 64), (1.0, 1.0)))
    lengths = []
    for costs in (dear, cheap):
        replay = Replay(recording, costs)
        replay.times.ms[:] = [replay.times.predicted(1, n, n, 50)[0] for n in replay.times.nodes]
        asker = Controlled(CostController(4), replay.about)
        lengths.append(replay.run(asker).accepted_length)
    assert lengths[0] < 1.3 < 2 < lengths[1]


# --- times --------------------------------------------------------------------------------------


def test_times_of_other_trees_are_the_recorded_ones_changed_by_the_cost_model(target, tmp_path):
    _, recording = record(tmp_path, "vanilla", target)
    times = Replay(recording).times
    assert times.measured
    step = int(np.flatnonzero(times.nodes == 4)[0])
    assert times.changed(step, 4, 4)[0] == times.ms[step]
    before, after = (times.predicted(1, n, n, times.context[step])[0] for n in (4, 2))
    assert times.changed(step, 2, 2)[0] == pytest.approx(times.ms[step] * after / before)
    decoding = recording.columns["step.kind"] != FIRST
    usual = np.flatnonzero(decoding & (recording.columns["step.kind"] == 1))
    sizes = [(int(times.levels[s]), int(times.nodes[s]), times.context[s]) for s in usual]
    total = sum(times.predicted(1, *size)[0] for size in sizes)
    assert total == pytest.approx(times.ms[usual].sum(), rel=1e-6), "scaled to the run"


def test_fewer_levels_take_less_drafting(target, tmp_path):
    _, recording = record(tmp_path, "eagle", target)
    times = Replay(recording).times
    whole, half = (times.predicted(1, levels, 31, 40)[0] for levels in (6, 3))
    assert half < whole
    assert times.predicted(1, 9, 31, 40)[0] == whole, "there are no more"


def test_without_a_cost_model_it_is_fitted_to_the_steps(target, tmp_path, monkeypatch):
    monkeypatch.setattr(SpeculativePipeline, "costs", lambda self: None)
    _, recording = record(tmp_path, "vanilla", target)
    times = Replay(recording).times
    assert not times.measured
    assert times.predicted(1, 4, 4, 40)[0] > 0


# --- grids --------------------------------------------------------------------------------------


def test_a_grid_at_the_recorded_point_is_the_mean_of_the_steps(target, tmp_path):
    _, recording = record(tmp_path, "eagle", target)
    replay = Replay(recording)
    cells = replay.grid([3, 6], [8, 31], [1, 4])
    assert len(cells) == 8
    drafted = recording.columns["row.nodes"] > 1
    point = next(c for c in cells if c[:3] == (6, 31, 1))
    assert point.accepted_length == pytest.approx(recording.columns["row.emitted"][drafted].mean())
    assert cells[0].accepted_length <= point.accepted_length
    assert all(c.tokens_per_second > 0 for c in cells)


# --- runs that are not whole --------------------------------------------------------------------


def test_an_interrupted_run_can_be_replayed(target, tmp_path):
    pipeline = SpeculativePipeline(
        draft_mode="ngram", target=target, controller="fixed", record=tmp_path
    )
    count = [0]

    def interrupt(piece):
        count[0] += 1
        if count[0] == 9:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        pipeline.generate(PROMPTS[:3], max_tokens=60, on_token=interrupt)
    replay = Replay(read_recording(tmp_path))
    assert replay.recorded().disagree == 0
    assert walks(replay.run(Always(8))) == walks(replay.recorded())
    assert replay.run(Always(2)).tokens == replay.recorded().tokens


@pytest.mark.parametrize("mode", ["none", "vanilla"])
def test_runs_of_first_tokens_only(tmp_path, mode, capsys):
    pipeline = SpeculativePipeline(implementation="fake", draft_mode=mode, record=tmp_path)
    pipeline.generate(["a", "b"], max_tokens=1)
    assert cli.main(["replay", str(tmp_path), "--K", "0,2"]) == 0
    assert cli.main(["replay", str(tmp_path), "--grid"]) == 0
    assert "recorded" in capsys.readouterr().out


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeculativePipeline, "costs", lambda self: COSTS)
        fake = {"implementation": "fake", "record": where}
        SpeculativePipeline(tree=[2, 1], **fake).generate("a b", max_tokens=30)
        SpeculativePipeline(**fake).generate(["a b", "c"], max_tokens=30, temperature=0.5)
    return where


def test_the_table(folder, capsys):
    assert cli.main(["replay", str(folder), "--K", "1,4", "--controller", "adaptive,cost"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "run-002" in lines[0]
    assert "vanilla drafts" in lines[0]
    table = [line for line in lines if re.match(r"(recorded|K \d|adaptive|cost) ", line)]
    assert [line.split("  ")[0].strip() for line in table] == [
        "recorded",
        "K 1",
        "K 4",
        "adaptive",
        "cost",
    ]
    assert table[0].split()[1:] == table[2].split()[2:], "K 4 is what was recorded"


def test_the_grid(folder, capsys):
    tree = str(folder / "run-001")
    assert cli.main(["replay", tree, "--grid", "--batch", "1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith(" K  nodes"))
    assert lines[head].split()[-4:] == ["batch", "1", "batch", "2"]
    points = [line.split()[:2] for line in lines[head + 1 :] if re.match(r" *\d", line)]
    assert points == [[k, n] for k in "12" for n in "124"]


def test_policies_of_the_command(folder, capsys):
    words = ["--policy", "conf_threshold", "--tau", "0.1"]
    assert cli.main(["replay", str(folder), *words]) == 0
    assert "policy conf_threshold, tau 0.1" in capsys.readouterr().out
    assert cli.main(["replay", str(folder), "--policy", "topk_agree", "--k", "3"]) == 0
    assert "policy topk_agree, k 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--K", "65"), "--K: 65 is not allowed; must be from 0 to 64"),
        (("--K", "x"), "--K: 'x' is not a list of numbers: 1,4,16"),
        (("--nodes", "0"), "--nodes: 0 is not allowed; must be from 1 to 255"),
        (("--batch", "4"), "--batch: is of --grid"),
        (("--grid", "--controller", "cost"), "--controller: has no meaning with --grid"),
        (("--grid", "--nodes", "4"), "--nodes: the recorded drafts are chains"),
        (("--tau", "0.5"), "--tau: is of --policy conf_threshold; give that too"),
        (("--k", "4"), "--k: is of --policy topk_agree; give that too; the levels drafted are --K"),
        (("--policy", "conf_threshold", "--tau", "2"), "--tau: 2.0 is not allowed"),
        (("--policy", "topk_agree", "--k", "0"), "--k: 0 is not allowed"),
        (("--policy", "typical"), "--policy: typical cannot be replayed"),
        (("--policy", "rejection"), "--policy: rejection cannot be replayed"),
        (("--controller", "fixed"), "--controller: fixed is what --K asks for"),
        (("--controller", "best"), "--controller: 'best' is unknown"),
        (("--max-k", "4"), "--max-k: is of --controller adaptive or cost"),
        (("--controller", "cost", "--min-k", "2"), "--min-k: is of --controller adaptive"),
        (("--controller", "cost", "--max-k", "99"), "--max-k is 99; it must be an integer"),
    ],
)
def test_flags_that_make_no_sense(folder, capsys, words, message):
    try:
        code = cli.main(["replay", str(folder), *words])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err


def test_folders_that_hold_nothing_are_named(tmp_path, capsys):
    for where, message in ((tmp_path / "x", "does not exist"), (tmp_path, "holds no recording")):
        assert cli.main(["replay", str(where)]) == 2
        assert re.match(rf"error: DIR: .*{message}", capsys.readouterr().err)


def test_replaying_needs_no_torch(folder):
    code = (
        "import sys; from inferlab.cli import main; main(sys.argv[1:]);"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "replay", str(folder), "--K", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line["setting"] for line in json.loads(done.stdout)["settings"]] == ["recorded", "K 2"]
