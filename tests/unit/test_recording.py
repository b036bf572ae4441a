"""What is recorded of decoding, its files, and that recording changes no token."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from helpers.pairwise import pairwise
from helpers.recordings import PROMPTS, record
from helpers.sampling_cases import random_logits, random_walk
from inferlab import SpeculativePipeline, cli, kernels
from inferlab.errors import Interrupted, UsageError
from inferlab.kernels.reference.sampling import filtered, is_greedy, penalised_logits, probabilities
from inferlab.specdec import recording as recording_module
from inferlab.specdec.recorded import (
    COLUMNS,
    FIRST,
    KEY,
    NO_LIMIT,
    PHASES,
    begin_run,
    find_run,
    read_recording,
)
from inferlab.specdec.recording import _parents
from inferlab.specdec.replay import Replay
from inferlab.specdec.token_odds import at_each_node, token_odds
from inferlab.specdec.tree import DraftTree


@pytest.fixture(autouse=True)
def no_costs(monkeypatch):
    """Measuring them takes a second for each pipeline."""
    monkeypatch.setattr(SpeculativePipeline, "costs", lambda self: None)


@pytest.fixture(scope="module")
def target():
    return SpeculativePipeline(draft_mode="none").target


# --- what is told of each node ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "ties", "flat", "masked"])
@pytest.mark.parametrize("seed", range(4))
def test_odds_are_those_of_the_oracle(kind, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (3, 9, 701), kind, torch.float32)
    (tokens, links, _, sampling), allowed = random_walk(rng, logits)
    tree = DraftTree(tokens, links, False, [9] * 3, [9] * 3)
    parents = _parents(tree)
    monkeypatch.setattr("inferlab.specdec.token_odds.CHUNK", 9 * 701 * 2)  # in two parts
    each = at_each_node(sampling, tree) if sampling.uses_context else None
    odds, places = token_odds(logits, tokens, parents, sampling, allowed, each)
    for b, n in zip(*np.nonzero(links.depth.numpy() > 0), strict=True):
        parent, token = int(parents[b, n]), int(tokens[b, n])
        path, at = [], parent
        while at > 0:
            path.append(int(tokens[b, at]))
            at = int(parents[b, at])
        x = penalised_logits(logits[b, parent], sampling, b, path[::-1], allowed)
        if x is None:
            continue
        assert places[b, n] == int((x > x[token]).sum() + (x[:token] == x[token]).sum())
        keep, heat = torch.ones_like(x, dtype=torch.bool), 1.0
        if not is_greedy(sampling, b):
            keep, heat = filtered(x, sampling, b), float(sampling.temperature[b])
        expected = float(probabilities(x, keep, heat)[token])
        assert float(odds[b, n]) == pytest.approx(expected, rel=1e-5, abs=1e-12), (b, n)


def test_parents_are_found_in_the_links():
    rng = np.random.default_rng(0)
    parents = torch.tensor([[-1, *(int(rng.integers(0, n)) for n in range(1, 150))]] * 2)
    parents[1, 90:] = -2
    links = kernels.build_tree(parents.to(torch.int32))
    tree = DraftTree(parents.to(torch.int32), links, False, [1] * 2, [150, 90])
    assert torch.equal(_parents(tree), parents.clamp_min(0))


# --- what is recorded ---------------------------------------------------------------------------


@pairwise(
    draft_mode=["vanilla", "ngram", "recycling", "eagle", "medusa", "none", "ensemble"],
    temperature=[0.0, 0.8],
    batch=[1, 4],
)
def test_recording_changes_no_token_and_keeps_all(target, tmp_path, draft_mode, temperature, batch):
    results, recorded = record(tmp_path, draft_mode, target, batch=batch, temperature=temperature)
    plain = SpeculativePipeline(draft_mode=draft_mode, target=target)
    c = recorded.columns
    rows_of_step = np.repeat(np.arange(recorded.num_steps), c["step.rows"])
    ends = np.cumsum(c["row.emitted"].astype(int))
    starts = np.cumsum(c["row.nodes"].astype(int)) - c["row.nodes"]
    for index, (prompt, result) in enumerate(zip(PROMPTS, results, strict=False)):
        asked = {"max_tokens": 40, "temperature": temperature, "seed": index}
        assert plain.generate(prompt, **asked)["token_ids"] == result["token_ids"]
        rows = np.flatnonzero(c["row.request"] == c["request.id"][index])
        tokens = [c["emitted.token"][ends[row] - c["row.emitted"][row] : ends[row]] for row in rows]
        assert np.concatenate(tokens).tolist() == result["token_ids"]
        assert len(rows) == result["steps"]
        accepted = np.minimum(c["row.accepted"][rows], c["row.emitted"][rows])
        assert int(accepted.sum()) == result["accepted"]
        assert c["row.depth"][rows].sum() == result["proposed"]
        assert c["request.prompt"][index] == result["record"]["prompt_tokens"]
        assert (c["request.most"][index], c["request.seed"][index]) == (40, index)
        # Behind a root the target chooses what came, whatever was drafted.
        roots = c["row.root"][rows] - c["request.prompt"][index] + 1
        choices = c["node.choice"][starts[rows]].tolist()
        assert choices == [result["token_ids"][root] for root in roots]
    assert set(c["step.kind"][rows_of_step[c["row.nodes"] > 1]]) <= {1, 2}
    assert (c["step.kind"] == FIRST).sum() == len(PROMPTS[:4]) // batch
    assert (c["row.limit"] == NO_LIMIT).all()
    assert np.isnan(c["node.drafted"]).all()
    assert recorded.num_bytes / recorded.num_nodes <= 200
    assert recorded.about["draft_mode"] == draft_mode


def test_times_are_those_of_the_engines_clock(target, tmp_path):
    pipeline = SpeculativePipeline(draft_mode="ngram", target=target, record=tmp_path)
    before = dict(pipeline.engine.clock.totals)
    pipeline.generate(PROMPTS, max_tokens=12)
    ms = read_recording(tmp_path).columns["step.ms"].sum(0, dtype=np.float64)
    for place, phase in enumerate(PHASES[:-1]):
        spent = pipeline.engine.clock.totals[phase] - before[phase]
        assert ms[place] == pytest.approx(spent, rel=1e-4), phase
    assert ms[-1] > 0


def test_the_drafts_own_probability_where_there_is_one(target, tmp_path):
    _, recorded = record(tmp_path, "vanilla", target, policy="rejection", temperature=0.9)
    c = recorded.columns
    starts = np.cumsum(c["row.nodes"].astype(int)) - c["row.nodes"]
    drafted = np.delete(c["node.drafted"], starts)
    assert ((drafted > 0) & (drafted <= 1)).all()
    assert np.isnan(c["node.drafted"][starts]).all()


def test_limits_and_penalties(target, tmp_path):
    settings = {"min_new_tokens": 30, "repetition_penalty": 1.2, "top_p": 0.9}
    _, recorded = record(tmp_path, "vanilla", target, temperature=0.8, **settings)
    limits = recorded.columns["row.limit"]
    assert 0 < limits.min() < 10
    assert limits[0] == 30


# --- files --------------------------------------------------------------------------------------


def fake(folder, **settings):
    return SpeculativePipeline(implementation="fake", record=folder, **settings)


def test_each_pipeline_adds_a_run(tmp_path):
    folder = tmp_path / "new" / "folder"
    for number in (1, 2):
        pipeline = fake(folder)
        assert pipeline.engine.recorder.run == folder / f"run-{number:03d}"
        pipeline.generate("a", max_tokens=number)
        assert find_run(folder).name == f"run-{number:03d}"
    fake(folder)
    assert find_run(folder).name == "run-002", "the third one has no steps"
    assert find_run(folder / "run-001").name == "run-001"
    assert len(read_recording(folder / "run-001").columns["emitted.token"]) == 1


def test_a_run_is_as_many_parts_as_it_takes(tmp_path, monkeypatch):
    def recorded(folder):
        pipeline = fake(folder)
        for prompt in ("a b", "c d e", "f"):
            pipeline.generate([prompt, prompt + " x"], max_tokens=15)
        return read_recording(folder)

    whole = recorded(tmp_path / "one")
    monkeypatch.setattr(recording_module, "PART_NODES", 20)
    parted = recorded(tmp_path / "many")
    assert len(list(whole.folder.iterdir())) == 1
    assert len(list(parted.folder.iterdir())) > 3
    for name in COLUMNS:
        if name not in ("step.ms", "step.at_s"):
            np.testing.assert_array_equal(whole.columns[name], parted.columns[name], name)


def test_what_was_decoded_some_time_ago_is_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(recording_module, "PART_S", 0.0)
    pipeline = fake(tmp_path)
    pieces = pipeline.stream("a b", max_tokens=30)
    next(pieces)
    next(pieces)
    assert read_recording(tmp_path).num_steps == 2
    pieces.close()


def test_an_interrupted_run_can_be_read(tmp_path):
    pipeline = fake(tmp_path)
    seen = []

    def interrupt(piece):
        seen.append(piece)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        pipeline.generate("a b", max_tokens=40, on_token=interrupt)
    tokens = read_recording(tmp_path).columns["emitted.token"].tolist()
    assert tokens == caught.value.results[0]["token_ids"]
    assert len(tokens) > 2


def test_a_step_that_failed_leaves_the_others(tmp_path, monkeypatch):
    pipeline = fake(tmp_path)
    pipeline.generate("a", max_tokens=3)
    forward = pipeline.target.forward
    monkeypatch.setattr(pipeline.target, "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.generate("b", max_tokens=3)
    monkeypatch.setattr(pipeline.target, "forward", forward)
    pipeline.generate("c", max_tokens=4)
    assert len(read_recording(tmp_path).columns["emitted.token"]) == 7


def test_a_full_disk_ends_the_recording_and_not_the_run(tmp_path, monkeypatch, caplog):
    pipeline = fake(tmp_path)
    pipeline.generate("a", max_tokens=3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording_module, "write_part", full)
    for _ in range(3):
        assert pipeline.generate("b", max_tokens=4)["num_tokens"] == 4
    assert caplog.text.count("ends here: No space left on device") == 1
    assert len(read_recording(tmp_path).columns["emitted.token"]) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_fork_records_a_run_of_its_own(tmp_path):
    pipeline = fake(tmp_path)
    pipeline.generate("a", max_tokens=3)
    child = os.fork()
    if child == 0:
        try:
            pipeline.generate("b", max_tokens=5)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    pipeline.generate("c", max_tokens=4)
    runs = [
        len(read_recording(tmp_path / name).columns["emitted.token"])
        for name in ("run-001", "run-002")
    ]
    assert runs == [7, 5]


def test_folders_that_are_something_else_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"^record: .* holds notes.txt, which is no recording"):
        fake(tmp_path)
    with pytest.raises(UsageError, match=r"^record: .*notes.txt is a file"):
        fake(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match=r"^record: .*below is a file or below one"):
        fake(tmp_path / "notes.txt" / "below")
    with pytest.raises(UsageError, match=r"^record: .* cannot be made: embedded null byte; name a"):
        fake(f"{tmp_path}/a\0b")
    with pytest.raises(TypeError, match=r"^record is 3; it must be a text or a path"):
        SpeculativePipeline(implementation="fake", record=3)


def test_two_processes_do_not_share_a_run(tmp_path, monkeypatch):
    first = begin_run(tmp_path)
    monkeypatch.setattr("inferlab.specdec.recorded.check_folder", lambda folder: [])
    assert begin_run(tmp_path) != first, "though it was not seen"


# --- what cannot be read ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeculativePipeline, "costs", lambda self: None)
        patch.setattr(recording_module, "PART_NODES", 40)
        fake(folder).generate(["a b", "c d"], max_tokens=60)
    return folder / "run-001"


@pytest.fixture
def run(one_run, tmp_path):
    return shutil.copytree(one_run, tmp_path / "run")


def rewrite(path, metadata=None, **columns):
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        old = file.metadata()
    tensors.update(columns)
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, path, {**old, **(metadata or {})}
    )


def parts(run):
    return sorted(run.iterdir())


def test_a_part_opens_in_any_reader_of_safetensors(run):
    with safe_open(parts(run)[0], framework="pt") as file:
        assert set(file.keys()) == set(COLUMNS)
        assert json.loads(file.metadata()["about"])["draft_mode"] == "vanilla"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: parts(run)[0].write_bytes(parts(run)[0].read_bytes()[:-9]), "is damaged"),
        (lambda run: parts(run)[0].write_bytes(b""), "is damaged"),
        (lambda run: parts(run)[0].unlink(), "part 1 is missing, part-00002"),
        (lambda run: rewrite(parts(run)[1], {KEY: "1"}), "is of version 1 .* reads version 2"),
        (lambda run: save_file({"x": np.zeros(1)}, parts(run)[0]), "is no part of a recording"),
        (lambda run: rewrite(parts(run)[0], {"about": "{"}), "is damaged"),
        (lambda run: rewrite(parts(run)[0], **{"node.rank": None}), "is damaged"),
        (
            lambda run: rewrite(parts(run)[0], **{"node.rank": np.zeros(3, np.uint8)}),
            "node.rank has 3 entries, node.token has",
        ),
        (
            lambda run: rewrite(parts(run)[0], **{"row.root": np.zeros(3)}),
            "row.root is float64, not int32",
        ),
        (
            lambda run: rewrite(parts(run)[0], **{"step.ms": np.zeros((3, 2), np.float32)}),
            "step.ms has the shape",
        ),
        (
            lambda run: rewrite(
                parts(run)[0],
                **{"node.token": np.zeros(1, np.int32)}
                | {
                    name: np.zeros(1, kind)
                    for name, kind in COLUMNS.items()
                    if name.startswith("node.")
                },
            ),
            "row.nodes counts .*, there are 1",
        ),
    ],
)
def test_damaged_files_are_named(run, spoil, message):
    spoil(run)
    with pytest.raises(UsageError, match=rf"^DIR: .*{message}"):
        read_recording(run)


def change(run, name, place, value):
    """Sets an entry of the first part."""
    with safe_open(parts(run)[0], framework="np") as file:
        column = file.get_tensor(name)
    column[place] = value
    rewrite(parts(run)[0], **{name: column})


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("row.root", -1, 2**31 - 1, "row.root has steps that do not begin where the text had come"),
        ("row.root", 0, 0, "row.root has steps that do not begin where"),
        ("row.request", 1, 77, "row.request has requests that are not in request.id"),
        ("row.limit", 1, 0, "row.limit has entries that are not at least 1"),
        ("row.accepted", 2, 500, "row.accepted has more tokens than the tree has nodes"),
        ("node.rank", slice(None), 0, "node.rank has a tree whose nodes are not in one order"),
        ("node.probability", -1, 7, "node.probability has entries that are not from 0 to 1"),
        ("node.drafted", -1, -1, "node.drafted has entries that are not from 0 to 1"),
        ("node.kind", -1, 40, "node.kind has kinds above 11"),
        ("step.kind", 1, 9, "step.kind has entries that are not 0, 1 or 2"),
        ("step.ms", (1, 2), np.nan, "step.ms has entries that are not times"),
        ("step.ms", (1, 2), -1e9, "step.ms has entries that are not times"),
        ("step.ms", (1, 2), np.inf, "step.ms has entries that are not times"),
        ("step.at_s", 0, np.nan, "step.at_s has entries that are not times"),
        ("request.most", 0, 0, "request.most has entries that are not at least 1"),
        ("request.prompt", 0, -3, "request.prompt has entries that are not at least 1"),
    ],
)
def test_values_that_cannot_be_are_damage(run, name, place, value, message):
    read_recording(run)
    change(run, name, place, value)
    with pytest.raises(UsageError, match=rf"^DIR: .* is damaged: {message}.*; record anew$"):
        read_recording(run)


def test_a_part_that_is_there_twice_is_damage(run):
    shutil.copy(parts(run)[0], run / f"part-{len(parts(run)) + 1:05d}.safetensors")
    with pytest.raises(UsageError, match=r"is damaged: request.id has a request twice"):
        read_recording(run)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda about: [], "about: "),
        (lambda about: None, "about: "),
        (lambda about: {k: v for k, v in about.items() if k != "tree"}, "about.tree: "),
        (lambda about: about | {"tree": 3}, "about.tree: "),
        (lambda about: about | {"tree": about["tree"] | {"form": "bush"}}, "about.tree.form: "),
        (lambda about: about | {"machine": ["cpu"]}, "about.machine: "),
        (lambda about: about | {"ladder": [[1]]}, "about.ladder.0: "),
        (lambda about: about | {"known": "x"}, "about.known: "),
        (lambda about: about | {"temperature": "warm"}, "about.temperature: "),
        (lambda about: about | {"policy": {}}, "about.policy.policy: "),
    ],
)
def test_facts_that_cannot_be_are_damage(run, change, where):
    with safe_open(parts(run)[0], framework="np") as file:
        about = json.loads(file.metadata()["about"])
    rewrite(parts(run)[0], {"about": json.dumps(change(about))})
    with pytest.raises(UsageError, match=rf"^DIR: .*part-00001.* is damaged: {where}.*; record"):
        read_recording(run)


def test_costs_of_another_version_are_fitted_anew(run, caplog):
    with safe_open(parts(run)[0], framework="np") as file:
        about = json.loads(file.metadata()["about"])
    rewrite(parts(run)[0], {"about": json.dumps(about | {"costs": '{"version": 1}'})})
    replay = Replay(read_recording(run))
    assert not replay.times.measured
    assert "are not read: version is 1" in caplog.text


def test_walks_that_come_out_otherwise_are_told(run, capsys):
    assert Replay(read_recording(run)).recorded().disagree == 0
    change(run, "node.choice", slice(None), -1)
    assert cli.main(["replay", str(run)]) == 0
    assert "recorded walks come out otherwise" in capsys.readouterr().out
    assert cli.main(["replay", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["disagree"] > 0


def test_a_parent_behind_its_child_is_damage(run):
    with safe_open(parts(run)[0], framework="np") as file:
        parents = file.get_tensor("node.parent")
    parents[-1] = 200
    rewrite(parts(run)[0], **{"node.parent": parents})
    with pytest.raises(UsageError, match="parent behind its child"):
        read_recording(run)


def test_what_is_no_recording_is_said(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_recording(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no recording; make one with: inferlab specdec"):
        read_recording(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        read_recording(tmp_path / "file")
    begin_run(tmp_path / "empty")
    with pytest.raises(UsageError, match="holds no steps"):
        read_recording(tmp_path / "empty")


# --- commands -----------------------------------------------------------------------------------

FAKE = ("--impl", "fake", "--max-tokens", "5", "--prompt", "a b")


def test_specdec_and_bench_record(tmp_path, capsys):
    folder = tmp_path / "runs"
    assert cli.main(["specdec", *FAKE, "--record", str(folder)]) == 0
    assert len(read_recording(folder).columns["request.id"]) == 1
    bench = ["bench", "--mode", "specdec", *FAKE, "--iterations", "2", "--warmup", "1"]
    assert cli.main([*bench, "--compare-baseline", "--record", str(folder)]) == 0
    assert find_run(folder).name == "run-002", "plain decoding beside it is not recorded"
    assert len(read_recording(folder).columns["request.id"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("specdec", *FAKE), r"--record: .* holds notes.txt, which is no recording"),
        (("bench", "--mode", "specdec", *FAKE), r"--record: .* holds notes.txt"),
        (("bench", "--modes", "all", *FAKE), "--record: records one draft mode"),
        (("bench", "--mode", "local", "--prompt", "a"), "--record: has no meaning in --mode local"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path, capsys, words, message):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main([*words, "--record", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(f"^error: {message}", captured.err), captured.err
