"""`inferlab certify`: flags, files, tables and exit codes."""

from __future__ import annotations

import json

import pytest

from inferlab.certify.lossless import certify_lossless
from inferlab.certify.report import certificate_report
from inferlab.cli import main
from inferlab.reports.terminal import print_report

LOSSLESS = ("certify", "lossless", "--impl", "fake", "--max-tokens", "6", "--samples", "64",
            "--prompt", "one two", "--sampler", "0.8", "--log-level", "ERROR")  # fmt: skip
QUIET = ("--prompt", "import os", "--max-tokens", "4", "--log-level", "ERROR")


def test_lossless_prints_a_table_and_writes_a_certificate(capsys, tmp_path):
    file = tmp_path / "c.json"
    assert main([*LOSSLESS, "--tree", "2,1", "--batch", "2", "--output", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "laws of small vocabularies" in shown
    assert "vanilla, tree 2,1, temperature=0.8, batch 64" in shown
    assert shown.splitlines()[-1].startswith("certified: ")
    assert not (tmp_path / "c.json.part").exists()
    value = json.loads(file.read_text())
    assert value["settings"]["samplers"] == ["temperature=0.8"]
    assert value["settings"]["trees"] == ["2,1"]
    assert value["environment"]["torch"]
    assert main(["certify", "lossless", "--check", str(file), "--log-level", "ERROR"]) == 0
    assert capsys.readouterr().out.startswith("confirmed: every figure came out again")
    value["checks"][0]["name"] = "another"
    file.write_text(json.dumps(value))
    assert main(["certify", "lossless", "--check", str(file), "--log-level", "ERROR"]) == 1
    assert "checks[0].name: stated" in capsys.readouterr().out


def test_a_lossy_policy_is_an_exit_code(capsys):
    assert main([*LOSSLESS, "--policy", "topk_agree", "--k", "3", "--tree", "chain"]) == 1
    assert "not certified: topk_agree is lossy" in capsys.readouterr().out


def test_failures_are_printed(capsys):
    from helpers.broken_verifiers import match

    settings = {
        "config": {"implementation": "fake"}, "draft_modes": ["ngram"], "trees": ["chain"],
        "samplers": ["greedy"], "batches": [1], "quantizations": ["none"], "prompts": ["a"],
        "max_tokens": 4, "samples": 0, "seed": 1,
    }  # fmt: skip
    made = certify_lossless(settings, verifier=match("first child always taken"))
    print_report(certificate_report(made))
    shown = capsys.readouterr().out
    assert "failed: one draft: " in shown
    assert "not certified: " in shown


def test_greedy_against_generate_and_recorded_ids(capsys, tmp_path):
    assert main(["certify", "greedy", *QUIET]) == 0
    assert "no divergence from Hugging Face generate" in capsys.readouterr().out
    file = tmp_path / "ids.jsonl"
    file.write_text(json.dumps({"prompt": "import os", "token_ids": [7, 7]}))
    assert main(["certify", "greedy", "--ids", str(file), "--log-level", "ERROR"]) == 1
    shown = capsys.readouterr().out
    assert "bug: theirs" in shown
    assert "not certified: 0 of 1 prompts identical" in shown


def test_quality_prints_a_table(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("import os\nimport sys\n\n\ndef main():\n    return os.path\n" * 8)
    words = ("certify", "quality", *QUIET, "--text", str(text))
    assert main([*words, "--quantizations", "int4", "--policies", "typical", "--p", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "| typical p 0.5 " in shown
    assert "| int4 " in shown
    assert main([*words, "--quantizations", "int4", "--max-kl", "1e-9"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lossless", "--draft-mode", "magic"), "--draft-mode: magic is not allowed"),
        (("lossless", "--tree", "3,x"), "--tree: 3,x is no list"),
        (("lossless", "--tree", "grown"), "--tree: grown: only"),
        (("lossless", "--sampler", "hot"), "--sampler: 'hot'"),
        (("lossless", "--samples", "-1"), "--samples: -1"),
        (("lossless", "--batch", "0"), "'0' is not a list of numbers"),
        (("lossless", "--quantizations", "int3"), "--quantizations: int3"),
        (("lossless", "--prompt", " "), "--prompt: is empty"),
        (("lossless", "--check", "none.json"), "--check: none.json cannot be read"),
        (("lossless", "--check", "none.json", "--seed", "1"), "cannot be read"),
        (("greedy", "--ids", "none.json"), "--ids: none.json cannot be read"),
        (("greedy", "--impl", "fake", "--prompt", "a"), "needs a model with weights"),
        (("quality", "--policies", "kind"), "--policies: kind"),
        (("quality", "--dtypes", "int1"), "--dtypes: int1"),
        (("quality", "--window", "8", "--stride", "8"), "--stride: 8"),
        (("quality", "--window", "1"), "--window: 1"),
        (("quality", "--stride", "0"), "--stride: 0"),
        (("quality", *QUIET, "--max-kl", "nan"), "--max-kl: nan"),
        (("quality", *QUIET, "--max-kl", "-1"), "--max-kl: -1"),
        (("greedy", "--prompt", "a", "--max-tokens", "0"), "--max-tokens: 0"),
        (("lossless", "--tensor-parallel", "2"), "--tensor-parallel: a certificate is of"),
        (("quality", "--text", "none.txt"), "--text: none.txt cannot be read"),
        (("quality", "--impl", "fake", "--prompt", "a"), "certify quality needs a model"),
    ],
)
def test_bad_input_is_named(words, message, capsys):
    try:
        code = main(["certify", *words])
    except SystemExit as done:
        code = done.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_nothing_is_said_beside_a_file(capsys, tmp_path):
    file = tmp_path / "c.json"
    assert main([*LOSSLESS, "--samples", "0", "--tree", "chain", "--output", str(file)]) == 0
    assert main(["certify", "lossless", "--check", str(file), "--seed", "3"]) == 2
    assert "--seed: has no meaning with --check" in capsys.readouterr().err
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"prompt": "a", "token_ids": [1]}')
    assert main(["certify", "greedy", "--ids", str(ids), "--prompt", "a"]) == 2
    assert "--prompt: has no meaning with --ids" in capsys.readouterr().err


def test_checks_that_were_made_are_not_lost(capsys, tmp_path, monkeypatch):
    from inferlab.cli import certify

    def interrupted(settings, on_check):
        on_check({"name": "one"})
        raise KeyboardInterrupt

    monkeypatch.setitem(certify._MAKERS, "lossless", interrupted)
    assert main([*LOSSLESS, "--output", str(tmp_path / "c.json")]) == 130
    assert json.loads((tmp_path / "c.json.part").read_text()) == {"name": "one"}
    assert "what was finished is in" in capsys.readouterr().err


def greedy_file(tmp_path):
    """(a certificate's file, what it holds)."""
    file = tmp_path / "c.json"
    assert main(["certify", "greedy", *QUIET, "--output", str(file)]) == 0
    return file, json.loads(file.read_text())


def checked(file, value, capsys, *words):
    """(exit code, stderr) of checking it again, with other content."""
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    capsys.readouterr()
    code = main(["certify", "greedy", "--check", str(file), "--log-level", "ERROR", *words])
    return code, capsys.readouterr().err


def test_a_file_alone_does_not_let_a_checkpoint_run_code(capsys, tmp_path):
    file, value = greedy_file(tmp_path)
    for key in ("trust_remote_code", "allow_pickle"):
        config = {**value["settings"]["config"], key: True}
        asking = {**value, "settings": {**value["settings"], "config": config}}
        flag = f"--{key.replace('_', '-')}"
        code, said = checked(file, asking, capsys)
        assert code == 2
        assert f"give {flag}, too" in said
        assert checked(file, asking, capsys, flag)[0] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": []}, "settings: config: "),
        ({"config": {"base_model": 5}}, "settings: base_model: "),
        ({"config": {"record": "runs"}}, "config.record has no meaning"),
        ({"config": {"tensor_parallel": 2}}, "--tensor-parallel: a certificate is of a target on"),
        ({"prompts": []}, "prompts are missing"),
        ({"max_tokens": -4}, "--max-tokens: -4 is not allowed"),
        ({"exact": "float16"}, "settings: exact: "),
        ({"recorded": [[1], [2]]}, "recorded has 2 lists of token ids for 1 prompts"),
        ({"recorded": [[10**30]]}, "is no token id of inferlab/tiny"),
    ],
)
def test_settings_edited_by_hand_are_named(settings, message, capsys, tmp_path):
    file, value = greedy_file(tmp_path)
    code, said = checked(file, {**value, "settings": {**value["settings"], **settings}}, capsys)
    assert code == 2
    assert message in said


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "cannot be read"), ('{"kind": [1]}', "is no certificate of greedy")],
)
def test_files_of_other_kinds_are_named(text, message, capsys, tmp_path):
    code, said = checked(tmp_path / "c.json", text, capsys)
    assert code == 2
    assert message in said


def test_long_prompts_leave_room_for_samples(capsys):
    words = ("--prompt", "word " * 2000, "--max-tokens", "2", "--samples", "2", "--tree", "chain")
    words = (*words, "--batch", "1", "--sampler", "0.8", "--impl", "fake", "--log-level", "ERROR")
    main(["certify", "lossless", *words])
    assert "samples of the engine" in capsys.readouterr().out
