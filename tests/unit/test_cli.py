"""The command line: flags, one-line errors, exit codes, prompt files, JSON alone on stdout."""

import argparse
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import inferlab
from helpers.collecting import arguments, collect, fake_result, shout
from inferlab import cli, output
from inferlab.cli import parser as cli_parser
from inferlab.cli import specdec, terminal
from inferlab.errors import UsageError
from inferlab.prompts import Prompt, read_prompts


def run_cli(*words: str) -> int:
    """The exit code, whether main returns it or argparse exits with it."""
    try:
        return cli.main(words)
    except SystemExit as exit_:
        return int(exit_.code or 0)


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr; nothing may be on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


# --- inferlab -----------------------------------------------------------------------------------


def test_version(capsys):
    assert run_cli("--version") == 0
    assert capsys.readouterr().out == f"inferlab {inferlab.__version__}\n"


def test_help_lists_the_commands(capsys):
    assert run_cli("--help") == 0
    text = capsys.readouterr().out
    for command in ("baseline", "specdec", "advise", "bench", "ping", "train", "replay", "doctor"):
        assert f"\n    {command} " in text


def test_the_package_itself_is_the_command():
    command = [sys.executable, "-m", "inferlab", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"inferlab {inferlab.__version__}\n")


def test_every_command_has_log_flags():
    kinds = cli.make_parser()._subparsers._group_actions[0].choices
    assert set(kinds) == set(cli.COMMANDS)
    parts = {
        f"{name} {part}": parser
        for name in ("train", "certify")
        for part, parser in kinds.pop(name)._subparsers._group_actions[0].choices.items()
    }
    for name, parser in {**kinds, **parts}.items():
        assert {"--log-level", "--verbose"} <= set(parser._option_string_actions), name


def test_log_level_beats_the_file(capsys, tmp_path):
    words = ("specdec", "--impl", "fake", "--max-tokens", "2", "--prompt", "a")
    file = tmp_path / "loud.yaml"
    file.write_text("log_level: DEBUG\n")
    assert run_cli(*words, "--config", str(file)) == 0
    assert "1 of 1 prompts done" in capsys.readouterr().err
    assert run_cli(*words, "--config", str(file), "--log-level", "ERROR") == 0
    assert capsys.readouterr().err == ""
    assert run_cli(*words, "--log-level", "LOUD") == 2
    assert "--log-level: invalid choice: 'LOUD'" in one_error(capsys)


COMPLETE = """
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_inferlab; echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_shell_completion(capsys):
    pytest.importorskip("shtab")
    assert run_cli("--print-completion", "bash") == 0
    script = capsys.readouterr().out
    for words in ("inferlab cal", "inferlab specdec --draft-mode med", "inferlab bench --temp",
                  "inferlab bench comp", "inferlab bench compare --tol"):  # fmt: skip
        script += COMPLETE.format(words=words)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["calibrate", "medusa medusa-lite", "--temperature",
                                         "compare", "--tolerance"]  # fmt: skip


def test_completion_without_its_library(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run_cli("--print-completion", "bash") == 2
    assert "pip install 'llm-inference-lab[completion]'" in one_error(capsys)


@pytest.fixture(autouse=True)
def own_logging():
    """What a command sets up here must not reach other tests."""
    logger = logging.getLogger("inferlab")
    before = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = before[0]
    logger.setLevel(before[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "required: <command>"),
        (("speccdec",), "invalid choice: 'speccdec'"),
        (("specdec",), "one of the arguments --prompt --prompts is required"),
        (("specdec", "--prompt", "a", "--prompts", "b"), "not allowed with argument --prompt"),
        (("specdec", "--prompt", "a", "--K", "x"), "argument --K: invalid int value: 'x'"),
        (("specdec", "--prompt", "a", "--tau", "x"), "argument --tau: invalid float value: 'x'"),
        (("specdec", "--prompt", "a", "--policy", "x"), "argument --policy: invalid choice: 'x'"),
        (("specdec", "--prompt", "a", "--max-tok", "3"), "unrecognized arguments: --max-tok 3"),
        (
            ("specdec", "--prompt", "a", "--tree", "a"),
            "'a' is neither one of chain, optimal, grown nor a list",
        ),
        (("specdec", "--prompt", ""), "--prompt: is empty; give a text"),
        (("specdec", "--prompt", "a", "--K", "-1"), "--K: -1 is not allowed; must be an integer"),
        (("specdec", "--prompt", "a", "--K", "65"), "--K: 65 is not allowed; must be an integer"),
        (("specdec", "--prompt", "a", "--max-draft", "-1"), "--max-draft: -1 is not allowed"),
        (("specdec", "--prompt", "a", "--k", "0"), "--k: 0 is not allowed; must be an integer"),
        (("specdec", "--prompt", "a", "--tau", "1.5"), "--tau: 1.5 is not allowed; must be a num"),
        (("specdec", "--prompt", "a", "--p", "-1"), "--p: -1.0 is not allowed; must be a number"),
        (("specdec", "--prompt", "a", "--max-tokens", "0"), "--max-tokens: 0 is not allowed"),
        (("specdec", "--prompt", "a", "--temperature", "-1"), "--temperature: -1.0 is not allowed"),
        (("specdec", "--prompt", "a", "--temperature", "nan"), "--temperature: nan is not allowed"),
        (("specdec", "--prompt", "a", "--device", "tpu"), "--device: 'tpu' is not allowed"),
        (("specdec", "--prompt", "a", "--tree", "16,16"), "--tree: [16, 16] is not allowed"),
        (("specdec", "--prompt", "a", "--batch-size", "0"), "--batch-size: 0 is not allowed"),
        (("specdec", "--prompt", "a", "--min-k", "9"), "--min-k: 9 is not allowed; must be at"),
        (("specdec", "--prompt", "a", "--config", "no.yaml"), "no.yaml: does not exist; give a"),
        (
            ("specdec", "--prompt", "a", "--config", "configs/vllm.yaml"),
            "configs/vllm.yaml: host: is a key of vllm files; this one is read as a specdec file",
        ),
        (("specdec", "--prompt", "a", "--adaptive-K", "--K", "4"), "contradicts --K 4"),
        (("specdec", "--prompt", "a", "--tree", "2,1", "--K", "4"), "--K 4 contradicts --tree"),
        (("specdec", "--prompt", "a", "--tree", "2,1", "--max-draft", "4"), "contradicts --tree"),
        (
            ("specdec", "--prompt", "a", "--adaptive-K", "--controller", "cost"),
            "--adaptive-K contradicts --controller cost",
        ),
        (("specdec", "--prompt", "a", "--heads", "x"), "--heads: names the heads of --draft-mode"),
        (("specdec", "--prompt", "a", "--tree", "grown"), "--tree: 'grown' is not for draft_mode"),
        (("specdec", "--prompt", "a", "--output", "/no/x.json"), "its directory does not exist"),
        (("specdec", "--prompts", "no.jsonl"), "no.jsonl: cannot be read: No such file"),
        (("baseline", "--prompt", "a", "--max-tokens", "-3"), "--max-tokens: -3 is not allowed"),
        (("baseline", "--prompt", "a", "--dtype", "int8"), "argument --dtype: invalid choice"),
        (("baseline", "--prompt", "a", "--model", ""), "--model: '' is not allowed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, words, message):
    assert run_cli(*words) == 2
    assert message in one_error(capsys)


def test_a_missing_model_directory_is_named(capsys, tmp_path):
    assert run_cli("specdec", "--prompt", "a", "--base-model", str(tmp_path / "no")) == 2
    assert f"{tmp_path / 'no'}' does not exist" in one_error(capsys)


def read(*words: str):
    parser = cli_parser.Parser()
    specdec.add_arguments(parser)
    return specdec.read_config(parser.parse_args(["--prompt", "a", *words]))


def test_flags_reach_the_configuration():
    config = read(
        "--K", "6", "--k", "3", "--p", "0.8", "--tau", "0.3", "--policy", "typical",
        "--controller", "adaptive", "--min-k", "2", "--max-k", "5", "--target-acceptance", "0.6",
        "--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.05",
        "--max-tokens", "12", "--seed", "7", "--device", "cpu", "--impl", "fake",
        "--draft-mode", "ngram", "--force-device", "cpu", "--dtype", "bfloat16",
        "--stop", "END", "--stop", "\n", "--batch-size", "3", "--base-model", "b",
        "--draft-model", "d",
    )  # fmt: skip
    assert (config.max_draft, config.agree_k, config.p, config.tau) == (6, 3, 0.8, 0.3)
    assert (config.policy, config.controller) == ("typical", "adaptive")
    assert (config.min_k, config.max_k, config.target_acceptance) == (2, 5, 0.6)
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (0.9, 40, 0.95, 0.05)
    assert (config.max_new_tokens, config.seed, config.device) == (12, 7, "cpu")
    assert (config.implementation, config.draft_mode, config.force_device) == (
        "fake",
        "ngram",
        "cpu",
    )
    assert (config.dtype, config.stop) == ("bfloat16", ("END", "\n"))
    assert read("--tree", "4,2,1").tree == (4, 2, 1)
    assert (config.max_batch, config.base_model, config.draft_model) == (3, "b", "d")


def test_flags_beat_the_file_and_the_file_beats_the_defaults():
    config = read("--config", "configs/specdec.yaml", "--K", "2", "--seed", "42")
    assert (config.max_draft, config.seed) == (2, 42)
    assert (config.implementation, config.top_k) == ("fake", 50)
    assert read("--config", "configs/specdec.yaml", "--impl", "hf").implementation == "hf"
    assert read("--adaptive-K").controller == "adaptive"
    assert read().implementation == "hf"


# --- prompt files -------------------------------------------------------------------------------


def test_prompt_files_in_both_formats(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "one"}\n'
        "\n"
        '{"prompt": "two\\nlines", "id": "x", "category": "c"}\n'
        '{"question_id": 81, "category": "writing", "turns": ["first", "second"]}\n'
        '{"prompt": "a\u2028b", "reference": []}'
    )
    assert read_prompts(file) == [
        Prompt("one"),
        Prompt("two\nlines", "x", "c"),
        Prompt("first", 81, "writing"),
        Prompt("a\u2028b"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "is not JSON"),
        ('["a"]', "must be an object with `prompt` or `turns`"),
        ('"a"', "must be an object with `prompt` or `turns`"),
        ('{"text": "a", "n": 1}', "has neither `prompt` nor `turns`; it has text, n"),
        ('{"prompt": 3}', "`prompt` must be a text, not 3"),
        ('{"turns": []}', "`turns` must be a list with at least one text"),
        ('{"turns": "a"}', "`turns` must be a list with at least one text"),
        ('{"turns": [null]}', "`turns[0]` must be a text, not None"),
        ('{"prompt": "a", "x": ' + "[" * 100_000, "cannot be read: its brackets are nested too"),
        ('{"prompt": "a", "id": ' + "9" * 5000 + "}", "cannot be read: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n\n' + line + "\n")
    with pytest.raises(UsageError) as caught:
        read_prompts(file)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert message in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_prompt_file(tmp_path, monkeypatch):
    content = b'\xef\xbb\xbf{"prompt": "one \xc3\xbc"}\r\n{"prompt": "two"}\r\n'
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    assert read_prompts(file) == [Prompt("one \u00fc"), Prompt("two")]
    # Prompts are UTF-8 whatever the terminal's encoding is.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    assert read_prompts("-") == [Prompt("one \u00fc"), Prompt("two")]


def test_prompt_files_without_prompts(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(UsageError, match="holds no prompts"):
        read_prompts(empty)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not UTF-8"):
        read_prompts(binary)
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path)


def test_a_prompt_set_of_many_categories(tmp_path):
    """480 questions, numbered from 81, of one turn or several, as Spec-Bench has them."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"question_id": 81 + i, "category": f"c{i % 6}", "turns": turns}) + "\n"
            for i in range(480)
            for turns in [[f"Question {i}: caf\u00e9?", "And then?"][: 1 + i % 2]]
        )
    )
    prompts = read_prompts(questions)
    assert len(prompts) == 480
    assert prompts[0].id == 81


# --- errors and exit codes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("bad\n  value"), 2, "error: bad value"),
        (FileNotFoundError("no such model"), 2, "error: no such model"),
        (RuntimeError("the kernel failed"), 1, "error: the kernel failed"),
        (MemoryError(), 1, "error: MemoryError"),
        (PermissionError(13, "Permission denied"), 1, "error: [Errno 13] Permission denied"),
        (TypeError("ours"), 1, "error: TypeError: ours (--verbose prints the traceback)"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(capsys, error, code, line):
    def run(args: argparse.Namespace) -> int:
        raise error

    assert cli_parser.call(run, argparse.Namespace(verbose=False)) == code
    assert capsys.readouterr().err == line + "\n"
    assert cli_parser.call(run, argparse.Namespace(verbose=True)) == code
    assert capsys.readouterr().err.startswith("Traceback")


def test_ctrl_c_is_130(capsys):
    def run(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    assert cli_parser.call(run, argparse.Namespace()) == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- results of one prompt or many --------------------------------------------------------------


def test_one_prompt_is_one_mapping_and_json_is_alone_on_stdout(capsys, tmp_path):
    args = arguments(prompt="a", output=str(tmp_path / "r.json"))
    _, code = collect([Prompt("a")], shout, args)
    assert code == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["text"] == "A"
    assert captured.out.count("\n") == 1
    assert "a library that prints" in captured.err
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(captured.out)
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"], "no partial file stays behind"


def test_many_prompts_have_labels_and_a_summary(capsys):
    prompts = [Prompt("a", 1, "x"), Prompt("b", 2, "y"), Prompt("c")]
    _, code = collect(prompts, shout, arguments(prompts="p"), batch_size=2)
    assert code == 0
    payload = json.loads(capsys.readouterr().out)
    assert [r["text"] for r in payload["results"]] == ["A", "B", "C"]
    assert [r.get("id") for r in payload["results"]] == [1, 2, None]
    assert [r["prompt"] for r in payload["results"]] == ["a", "b", "c"]
    summary = payload["summary"]
    assert (summary["prompts"], summary["num_tokens"], summary["errors"]) == (3, 6, 0)
    assert (summary["acceptance_rate"], summary["mean_accepted_length"]) == (0.25, 2.0)
    assert summary["interrupted"] is False


def test_one_bad_prompt_among_many_does_not_take_the_others_with_it(capsys):
    prompts = [Prompt(text) for text in ("a", "bad", "c")]
    _, code = collect(prompts, shout, arguments(prompts="p"), batch_size=3)
    assert code == 1
    payload = json.loads(capsys.readouterr().out)
    assert [r.get("error") for r in payload["results"]] == [None, "too long", None]


def test_what_fails_is_named_by_its_line_and_the_rest_is_decoded_together(capsys, caplog):
    calls = []

    def generate(texts):
        calls.append(texts)
        return shout(texts)

    prompts = [Prompt(text, where=f"p:{n}") for n, text in enumerate(["a", "bad", *"cdefgh"], 1)]
    collected, code = collect(prompts, generate, arguments(prompts="p"), batch_size=8)
    assert code == 1
    assert [r.get("error") for r in collected.results] == [None, "p:2: too long"] + [None] * 6
    assert [r["prompt"] for r in collected.results] == ["a", "bad", *"cdefgh"]
    assert calls[-1] == list("efgh")
    assert "p:2: too long" in caplog.text


@pytest.mark.parametrize("error", [TypeError("ours"), MemoryError(), KeyError("x")])
def test_no_error_of_one_prompt_takes_the_others_with_it(capsys, error):
    def generate(texts):
        if "bad" in texts:
            raise error
        return shout(texts)

    prompts = [Prompt(text, where="p:1") for text in ("a", "bad", "c")]
    collected, code = collect(prompts, generate, arguments(prompts="p"))
    assert code == 1
    assert collected.results[1]["error"].startswith(f"p:1: {type(error).__name__}")
    assert ["error" in r for r in collected.results] == [False, True, False]


def test_results_that_an_error_carries_are_kept(capsys):
    def generate(texts):
        error = RuntimeError("prompt 1: NaN")
        error.results = [fake_result("a"), fake_result("b", error="NaN"), fake_result("c")]
        raise error

    prompts = [Prompt(text, where=f"p:{n}") for n, text in enumerate("abc", 1)]
    collected, code = collect(prompts, generate, arguments(prompts="p"), batch_size=3)
    assert code == 1
    assert [r.get("error") for r in collected.results] == [None, "p:2: NaN", None]


def test_ctrl_c_behind_a_failed_chunk_labels_the_right_prompt(capsys):
    def generate(texts):
        if texts == ["c"]:
            interrupt = KeyboardInterrupt()
            interrupt.results = [fake_result("c")]
            raise interrupt
        return shout(texts)

    prompts = [Prompt(text) for text in ("a", "bad", "c")]
    collected, code = collect(prompts, generate, arguments(prompts="p"), batch_size=3)
    assert code == 130
    assert [r["prompt"] for r in collected.results] == ["a", "bad", "c"]
    assert [r.get("text") for r in collected.results] == ["A", None, "C"]


FAKE = ("--impl", "fake", "--max-tokens", "4", "--batch-size", "9")
LONG = "word " * 5000


@pytest.mark.parametrize(
    "words", [("specdec", *FAKE), ("specdec", *FAKE[:4]), ("baseline", "--max-tokens", "2")]
)
def test_prompts_that_cannot_be_run_fail_alone(capsys, tmp_path, words):
    """Half of a surrogate pair, nothing, blanks, and more than the context holds."""
    file = tmp_path / "p.jsonl"
    texts = ["one", "x \ud83d y", "two", "", " \n", LONG, "three"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert run_cli(*words, "--prompts", str(file), "--json", "--no-progress") == 1
    captured = capsys.readouterr()
    payload = json.loads(captured.out)
    found = payload["results"]
    assert [r["prompt"] for r in found] == texts
    assert [bool(r.get("text")) for r in found] == [True, False, True, *[False] * 3, True]
    for number, why in ((2, "half of a surrogate pair"), (4, "is empty"), (5, "is empty"),
                        (6, "exceed the context")):  # fmt: skip
        assert found[number - 1]["error"].startswith(f"{file}:{number}: prompt ")
        assert why in found[number - 1]["error"]
        assert f"{file}:{number}: prompt " in captured.err
    assert (payload["summary"]["prompts"], payload["summary"]["errors"]) == (7, 4)


@pytest.mark.parametrize("command", ["specdec", "baseline", "bench"])
def test_a_prompt_argument_that_cannot_be_encoded(capsys, command):
    assert run_cli(command, "--prompt", "x \udcff") == 2
    assert "--prompt holds '\\udcff' at character 2, half of a" in one_error(capsys)


def test_a_single_bad_prompt_is_an_error(capsys):
    with pytest.raises(ValueError, match="too long"):
        collect([Prompt("bad")], shout, arguments(prompt="bad"))


def test_ctrl_c_keeps_what_there_is(capsys):
    class Interrupted(KeyboardInterrupt):
        results: tuple = ()

    def generate(texts):
        if texts[0] == "c":
            interrupt = Interrupted()
            interrupt.results = [fake_result("c", finish_reason="interrupted")]
            raise interrupt
        return shout(texts)

    prompts = [Prompt(text) for text in "abcd"]
    collected, code = collect(prompts, generate, arguments(prompts="p"))
    assert code == 130
    assert collected.interrupted
    payload = json.loads(capsys.readouterr().out)
    assert [r["text"] for r in payload["results"]] == ["A", "B", "C"]
    assert payload["results"][2]["finish_reason"] == "interrupted"
    assert payload["summary"]["interrupted"] is True


def test_ctrl_c_before_the_first_result_prints_no_json(capsys):
    def generate(texts):
        raise KeyboardInterrupt

    _, code = collect([Prompt("a")], generate, arguments(prompt="a"))
    assert code == 130
    assert capsys.readouterr().out == ""


def test_json_of_what_json_lacks():
    text = output.to_json(
        {
            "nan": float("nan"),
            "inf": float("inf"),
            "np": np.float32(0.5),
            "array": np.arange(2),
            "tuple": (1, None),
            "path": Path("x"),
            3: True,
            "text": "ü\u2028",
        }
    )
    assert json.loads(text) == {
        "nan": None, "inf": None, "np": 0.5, "array": [0, 1], "tuple": [1, None], "path": "x",
        "3": True, "text": "ü\u2028",
    }  # fmt: skip


def test_json_is_cut_where_it_is_nested_too_deep():
    deep = json.loads("[" * 900 + "]" * 900)
    assert output.to_json(deep).count("[") == 100


def test_json_can_always_be_encoded():
    text = output.to_json({"half": "x \ud83d", "whole": "\U0001f30d"})
    assert text.encode().decode() == '{"half": "x \\ud83d", "whole": "\U0001f30d"}'
    assert json.loads(text)["half"] == "x \ud83d"


# --- logs ---------------------------------------------------------------------------------------


def test_logs_go_to_stderr_once(capsys):
    terminal.setup_logging("INFO")
    terminal.setup_logging("INFO")
    logging.getLogger("inferlab.specdec").info("hello")
    logging.getLogger("inferlab.specdec").debug("hidden")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("hello") == 1
    assert "hidden" not in captured.err


def test_logs_still_reach_a_programs_own_handlers(caplog):
    terminal.setup_logging("INFO")
    logging.getLogger("inferlab.specdec").info("hello")
    assert "hello" in caplog.text


def test_a_reader_that_has_gone_is_no_error():
    code = (
        "from inferlab.cli.parser import call; import argparse, sys\n"
        "sys.exit(call(lambda args: print('x' * 100_000) or 0, argparse.Namespace()))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr == ""


def test_generated_text_is_printed_as_it_is(capsys):
    text = "\tx\ta\rb\x0cc\x08[bold]:smile:\n" + "long " * 100
    terminal.show_text(text)
    assert capsys.readouterr().out == text + "\n"
    for piece in ("ab", "\tc", "\n"):
        terminal.show_piece(piece)
    assert capsys.readouterr().out == "ab\tc\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_that_the_terminal_cannot_show(encoding):
    """Lines of all helpers, plain and as JSON, in a process with another ``PYTHONIOENCODING``."""
    code = (
        "import argparse, sys\n"
        "from inferlab.cli.parser import call\n"
        "from inferlab.cli.terminal import clean_stdout, show_heading, show_line, show_text\n"
        "from inferlab.output import print_json\n"
        "TEXT = 'a \\u00fc \\u4e16 \\U0001f30d \\udcff b'\n"
        "def run(args):\n"
        "    print(TEXT)\n"
        "    show_heading(TEXT)\n"
        "    show_text(TEXT)\n"
        "    show_line([TEXT, TEXT])\n"
        "    with clean_stdout() as out:\n"
        "        print_json({'text': TEXT, 'nan': float('nan')}, out)\n"
        "    return 0\n"
        "sys.exit(call(run, argparse.Namespace()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    shown = "a ? ? ? ? b" if encoding == "ascii" else "a \u00fc ? ? ? b"
    first, heading, text, line, as_json = done.stdout.decode(encoding).splitlines()
    assert (first, text) == (shown, shown)
    assert shown in heading
    assert line.startswith(shown)
    assert line.endswith(shown)
    expected = {"text": "a \u00fc \u4e16 \U0001f30d \udcff b", "nan": None}
    assert json.loads(as_json) == expected


def test_stdout_is_as_before_behind_a_command(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli_parser.call(lambda args: print("\u00fc") or 0, argparse.Namespace()) == 0
    assert (out.buffer.getvalue(), out.errors) == (b"?\n", "strict")
    own = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="xmlcharrefreplace")
    monkeypatch.setattr(sys, "stdout", own)
    assert cli_parser.call(lambda args: print("\u00fc") or 0, argparse.Namespace()) == 0
    assert own.buffer.getvalue() == b"&#252;\n"


def test_json_is_readable_where_the_encoding_has_it_all():
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    output.print_json({"text": "\u00fc \u4e16"}, out)
    out.flush()
    assert out.buffer.getvalue().decode() == '{"text": "\u00fc \u4e16"}\n'


def test_no_progress_bar_where_stderr_is_no_terminal(capsys):
    with terminal.progress(10, "prompts") as advance:
        advance(5)
    assert capsys.readouterr().err == ""


def test_progress_in_lines_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.0)
    with terminal.progress(10, "runs") as advance:
        advance(4)
        advance(6)
    captured = capsys.readouterr()
    assert captured.err == "runs: 4 of 10\nruns: 10 of 10\n"
    assert captured.out == ""
    for more in ({"total": 1}, {"enabled": False}):
        with terminal.progress(**{"total": 10, "label": "runs", **more}) as advance:
            advance(1)
    assert capsys.readouterr().err == ""


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.progress(10, "prompts") as advance:
        advance(5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "prompts" in captured.err


# --- public names -------------------------------------------------------------------------------


def test_every_public_name_is_there():
    for name in inferlab.__all__:
        assert getattr(inferlab, name) is not None
    assert set(inferlab.__all__) <= set(dir(inferlab))
    with pytest.raises(AttributeError, match="no attribute 'Speculate'"):
        _ = inferlab.Speculate


def test_type_checkers_see_the_same_names():
    source = Path(inferlab.__file__).read_text()
    for name in set(inferlab.__all__) - {"__version__", *inferlab._EXPORTS["inferlab.types"]}:
        assert f" import {name} as {name}\n" in source
