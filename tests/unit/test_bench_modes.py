"""`inferlab bench --modes`: the table of all draft modes."""

from __future__ import annotations

import json

import pytest

from helpers.vocabularies import permuted
from inferlab.benchmarks.measure import MeasurementError
from inferlab.benchmarks.modes import DRAFT_MODES, ModesBenchmark
from inferlab.benchmarks.modes_report import modes_report
from inferlab.benchmarks.run_bench import main
from inferlab.benchmarks.runners import SpecdecRunner
from inferlab.config import SpecdecConfig
from inferlab.reports.terminal import print_report
from inferlab.specdec.pipeline import GenerationError, SpeculativePipeline

FAKE = SpecdecConfig(implementation="fake", max_new_tokens=24, iterations=2, warmup_iterations=1)
PROMPTS = ["Hello, world!", "one two three one two", "a b a b a"]


@pytest.fixture(scope="module")
def result():
    return ModesBenchmark(FAKE, ["vanilla", "ngram"], [1, 2]).run(PROMPTS)


def test_every_mode_is_measured_at_every_batch_size(result):
    assert list(result.batches) == [1, 2]
    for modes in result.batches.values():
        assert list(modes) == ["vanilla", "ngram", "plain"]
        assert all(figures["tokens_per_second"] > 0 for figures in modes.values())
        assert modes["plain"]["accepted_length"] == 1.0
        assert modes["plain"]["acceptance_by_position"] == []
        assert "x_plain" not in modes["plain"]
    alone = result.batches[1]["vanilla"]
    assert alone["accepted_length"] == 4.0  # K = 4, all agrees; the first step drafts nothing
    assert alone["acceptance_by_position"] == [1.0] * 4
    assert alone["x_plain"]["ratio"] > 0
    assert alone["phases_ms_per_token"]["draft"] > 0
    assert not result.failures


def test_the_tokens_are_those_of_plain_decoding(result):
    for found in result.token_ids.values():
        assert found["verdict"] == "identical"
        assert found["prompts"] == 3
        assert found["compared"] == ["vanilla", "ngram", "plain"]


def test_the_table_is_markdown(result, capsys):
    print_report(modes_report(result.as_dict()))
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("| mode"))
    assert header.count("|") == 9
    rows = [line for line in lines if line.startswith("| vanilla")]
    assert len(rows) == 2
    assert "1 1 1 1" in rows[0]


def test_the_number_of_runs_is_told_beforehand():
    benchmark = ModesBenchmark(FAKE, ["ngram"], [1, 2])
    made = []
    benchmark.run(PROMPTS, made.append)
    assert sum(made) == benchmark.num_runs(len(PROMPTS))


BAD = [*PROMPTS[:1], "", "x \ud83d", PROMPTS[1], "word " * 5000, PROMPTS[2]]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_bad_prompt_takes_none_of_its_batch_with_it(caplog, size):
    benchmark = ModesBenchmark(FAKE, ["vanilla", "ngram"], [size])
    made, kept = [], []
    names = [f"f:{line}" for line in range(1, 7)]
    found = benchmark.run(BAD, made.append, names=names, keep=kept.append)
    assert sum(made) == benchmark.num_runs(len(BAD))
    assert found.token_ids[size]["prompts"] == 3
    assert found.token_ids[size]["verdict"] == "identical"
    modes = ["vanilla", "ngram", "plain"]
    assert list(found.batches[size]) == modes
    assert [(row["prompt_index"], row["mode"]) for row in found.failures] == [
        (index, mode) for index in (1, 2, 4) for mode in modes
    ]
    told = [message for message in caplog.messages if "is left out" in message]
    assert [message.split()[0] for message in told] == ["f:2", "f:3", "f:5"]
    batches = {1: [[0], [3], [5]], 2: [[0, 3], [5]], 3: [[0, 3, 5]]}[size]
    first = [run["prompt_indices"] for run in kept[: len(kept) // 2]]
    assert first == [batch for batch in batches for _ in modes]
    assert all(run["result"]["num_tokens"] for run in kept)


def test_a_request_that_fails_while_it_runs_leaves_the_others_their_results(monkeypatch, caplog):
    """As with NaN logits: the engine ends that request, with an error, and goes on."""
    decode = SpeculativePipeline.generate

    def generate(self, prompts):
        results = decode(self, prompts)
        bad = [i for i, prompt in enumerate(prompts) if prompt in (PROMPTS[0], "bad")]
        for i in bad:
            results[i]["error"] = f"NaN in {prompts[i]}"
        if bad:
            raise GenerationError(f"prompt {bad[0]}: NaN", results)
        return results

    monkeypatch.setattr(SpeculativePipeline, "generate", generate)
    config = FAKE.model_copy(update={"iterations": 1, "warmup_iterations": 0})
    names = [f"f:{line}" for line in range(1, 6)]
    benchmark = ModesBenchmark(config, ["ngram"], [2])
    found = benchmark.run([*PROMPTS, "one more", "bad"], names=names)
    assert found.token_ids[2]["prompts"] == 3
    assert found.batches[2]["plain"]["accepted_length"] == 1.0
    assert sorted((row["prompt_index"], row["error"]) for row in found.failures) == [
        (0, f"NaN in {PROMPTS[0]}"), (0, f"NaN in {PROMPTS[0]}"),
        (4, "NaN in bad"), (4, "NaN in bad"),
    ]  # fmt: skip
    assert {message.split(",")[0] for message in caplog.messages} == {"f:1", "f:5"}


def test_a_speculative_run_that_fails_tells_its_reason_without_a_number(monkeypatch):
    def generate(self, prompt):
        raise GenerationError("prompt 0: NaN", [{"error": "NaN"}])

    monkeypatch.setattr(SpeculativePipeline, "generate", generate)
    runner = SpecdecRunner(SpeculativePipeline(config=FAKE))
    with pytest.raises(MeasurementError, match=r"^NaN$"):
        runner.run("x")


def test_prompts_that_are_all_bad(capsys):
    found = ModesBenchmark(FAKE, ["ngram"], [2]).run(["", ""])
    assert found.batches == {2: {}}
    assert len(found.failures) == 4
    print_report(modes_report(found.as_dict()))
    assert "failed: ngram, prompt 0, iteration 0: prompt is empty" in capsys.readouterr().out


def test_unknown_modes_and_sizes_are_named():
    with pytest.raises(ValueError, match="modes has 'magic'"):
        ModesBenchmark(FAKE, ["magic"])
    with pytest.raises(ValueError, match="batch_sizes has 64"):
        ModesBenchmark(FAKE, ["ngram"], [64])


def test_command(tmp_path, capsys):
    argv = ["--modes", "ngram", "--impl", "fake", "--prompt", "a b a b", "--iterations", "1",
            "--output", str(tmp_path / "modes"), "--json"]  # fmt: skip
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"]["controller"] == "cost"
    assert printed["settings"]["max_new_tokens"] == 128
    assert json.loads((tmp_path / "modes.json").read_text()) == printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--modes", "ngram", "--stream"), "--stream: has no meaning"),
        (("--modes", "all", "--heads", "x"), "--heads: belongs to one draft mode; with --modes"),
        (("--modes", "magic", "--impl", "fake", "--prompt", "a"), "--modes has 'magic'"),
        (("--mode", "specdec", "--prompt", "a", "--batch", "4"), "--batch: is of --modes"),
        (("--modes", "all", "--batch", "x"), "'x' is not a list of numbers"),
        (("--mode", "local"), "one of --prompt, --prompts and --heldout is required"),
    ],
)
def test_bad_flags_are_named(argv, message, capsys):
    try:
        code = main(list(argv))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_mode_without_such_a_tree_takes_its_own():
    config = FAKE.model_copy(update={"tree": "optimal"})
    pipelines = ModesBenchmark(config, ["vanilla", "ngram"])._pipelines
    assert pipelines["vanilla"].describe_drafter()["tree"]["nodes"] == 31
    assert pipelines["ngram"].config.tree is None


def test_a_draft_of_another_vocabulary_is_no_assistant(tmp_path):
    for draft in ("inferlab/tiny-draft", str(tmp_path)):
        if draft == str(tmp_path):
            with permuted("inferlab/tiny-draft").plain() as model:
                model.save_pretrained(tmp_path)
            permuted("inferlab/tiny-draft").tokenizer.save_pretrained(tmp_path)
        config = SpecdecConfig(draft_model=draft, device="cpu")
        runners = ModesBenchmark(config, ["vanilla"])._generators()
        assert ("hf-assistant" in runners) == (draft == "inferlab/tiny-draft")
        assert "hf-lookup" in runners


def test_all_modes_are_known():
    assert {"vanilla", "ngram", "medusa", "eagle"} <= set(DRAFT_MODES)
