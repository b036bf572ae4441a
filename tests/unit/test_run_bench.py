"""BenchmarkRunner and `inferlab bench` in all three modes, on fake, bundled and served models."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.faulty_server import FaultyServer, Respond, chat, closed_port, delta
from inferlab import _C
from inferlab.benchmarks import result_files, runners
from inferlab.benchmarks.run_bench import BenchmarkInterrupted, BenchmarkRunner, main
from inferlab.config import SpecdecConfig
from inferlab.errors import UsageError
from inferlab.models.assets import BUNDLED
from inferlab.specdec.pipeline import SpeculativePipeline

PROMPT = "def read_lines(path):"
SEED_KEYS = {"mean", "median", "std", "min", "max", "raw"}
OUR_KEYS = {"p90", "p99", "mean_ci95", "median_ci95"}


@pytest.fixture
def one_thread():
    """Models this small are no work for two threads, which wait for each other on busy cores."""
    threads = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(1)
    _C.set_num_threads(1)
    yield
    torch.set_num_threads(threads[0])
    _C.set_num_threads(threads[1])


def fake(**arguments):
    defaults = {"implementation": "fake", "max_new_tokens": 12, "warmup_iterations": 0}
    return BenchmarkRunner(mode="specdec", **{**defaults, **arguments})


# --- the runner ----------------------------------------------------------------------------------


def test_specdec_statistics_have_the_documented_keys():
    stats = fake(iterations=3).run_benchmark(PROMPT)
    assert stats["mode"] == "specdec"
    assert stats["runner_name"] == "SpeculativePipeline"
    assert (stats["iterations"], stats["warmup_iterations"]) == (3, 0)
    assert stats["prompt"] == PROMPT
    for key in ("latency_ms", "tokens_per_second", "acceptance_rate"):
        assert set(stats[key]) == SEED_KEYS | OUR_KEYS
        assert len(stats[key]["raw"]) == 3
    assert stats["num_tokens"]["raw"] == [12.0] * 3
    for latency, rate in zip(
        stats["latency_ms"]["raw"], stats["tokens_per_second"]["raw"], strict=True
    ):
        assert rate == pytest.approx(12 / latency * 1e3)
    assert len(stats["raw_results"]) == 3
    assert stats["raw_results"][0]["token_ids"] == stats["raw_results"][2]["token_ids"]
    assert (stats["draft_mode"], stats["max_draft"], stats["device"]) == ("vanilla", 4, "cpu")
    phases = stats["phases_ms_per_token"]
    assert {"draft", "verify", "accept", "commit"} <= set(phases)
    total = sum(phases.values()) * 36
    assert total == pytest.approx(sum(stats["latency_ms"]["raw"]), rel=0.01)
    assert stats["environment"]["torch"] == torch.__version__
    assert stats["environment"]["cores"] >= 1
    assert stats["failures"] == []
    assert stats["interrupted"] is False
    assert "error" not in stats
    assert "baseline_comparison" not in stats
    json.dumps(stats)


def test_many_prompts_are_told_apart():
    stats = fake().run_benchmark(["one prompt", "another prompt"], iterations=2)
    assert stats["num_prompts"] == 2
    assert [entry["prompt_index"] for entry in stats["by_prompt"]] == [0, 1]
    assert len(stats["latency_ms"]["raw"]) == 4
    ids = {entry["prompt_index"]: entry["token_ids"] for entry in stats["raw_results"]}
    assert ids[0] != ids[1]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_fake_comparison_has_equal_ids(temperature):
    benchmark = fake(compare_baseline=True, temperature=temperature, iterations=3)
    comparison = benchmark.run_benchmark(["a prompt", "b prompt"])["baseline_comparison"]
    assert list(comparison["modes"]) == ["specdec", "plain"]
    assert comparison["token_ids"]["verdict"] == "identical"
    assert comparison["token_ids"]["prompts"] == 2
    assert len(comparison["speedup_vs_plain"]["by_group"]) == 2
    assert comparison["modes"]["plain"]["mean_accepted_length"]["max"] == 1.0
    assert comparison["modes"]["specdec"]["mean_accepted_length"]["min"] > 1.0
    assert comparison["modes"]["plain"]["target_forwards"]["raw"] == [12.0] * 6
    assert comparison["baseline"] == "plain"
    assert set(comparison["latency_ms"]) >= SEED_KEYS


def test_the_plain_baseline_is_exact_under_a_lossy_policy():
    benchmark = fake(compare_baseline=True, policy="topk_agree", k=3, draft_mode="vanilla")
    assert benchmark.runners["plain"].describe()["policy"]["policy"] == "longest_prefix"
    assert benchmark.runners["plain"].describe()["draft_mode"] == "none"
    stats = benchmark.run_benchmark(PROMPT, iterations=2)
    found = stats["baseline_comparison"]["token_ids"]
    assert found["compared"] == ["plain"]
    assert "topk_agree" in found["not_compared"]["specdec"]


def test_comparison_sees_a_broken_engine(monkeypatch):
    """One wrong token of the speculative runs, as a bug in verification would make it."""
    original = runners.SpecdecRunner.run

    def broken(self, prompt):
        result = original(self, prompt)
        if self.pipeline.config.draft_mode != "none":
            result["token_ids"][5] += 1
        return result

    monkeypatch.setattr(runners.SpecdecRunner, "run", broken)
    stats = fake(compare_baseline=True, iterations=1).run_benchmark(PROMPT)
    found = stats["baseline_comparison"]["token_ids"]
    assert found["verdict"] == "different"
    assert found["differences"][0]["position"] == 5


def test_real_comparison_on_the_bundled_pair(one_thread):
    """Speculative, plain and Hugging Face give the same tokens, and those of generate alone."""
    benchmark = BenchmarkRunner(
        mode="specdec", compare_baseline=True, eval_perplexity=True, max_new_tokens=10,
        dtype="float32", warmup_iterations=0,
    )  # fmt: skip
    stats = benchmark.run_benchmark(PROMPT, iterations=1)
    comparison = stats["baseline_comparison"]
    assert list(comparison["modes"]) == ["specdec", "plain", "hf"]
    assert comparison["token_ids"]["verdict"] in ("identical", "ties")
    assert comparison["token_ids"]["compared"] == ["specdec", "plain", "hf"]
    assert comparison["speedup_vs_hf"]["ratio"] > 0
    assert comparison["speedup_vs_plain"]["ci95"] is None  # a single pair

    directory = BUNDLED["inferlab/tiny"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=10, do_sample=False)
    if comparison["token_ids"]["verdict"] == "identical":
        assert stats["raw_results"][0]["token_ids"] == output[0, ids.shape[1] :].tolist()
    labels = torch.cat([ids[0], torch.tensor(stats["raw_results"][0]["token_ids"])])[None]
    masked = labels.clone()
    masked[:, : ids.shape[1]] = -100
    with torch.inference_mode():
        loss = float(model(input_ids=labels, labels=masked).loss)
    assert stats["perplexity"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert stats["perplexity"]["tokens"] == len(stats["raw_results"][0]["token_ids"])
    assert stats["raw_results"][0]["perplexity_loss"] == pytest.approx(loss, rel=1e-3)


def test_plain_decoding_can_be_the_one_measured(one_thread):
    benchmark = BenchmarkRunner(
        mode="specdec", draft_mode="none", compare_baseline=True, max_new_tokens=6,
        dtype="float32", warmup_iterations=0,
    )  # fmt: skip
    comparison = benchmark.run_benchmark(PROMPT, iterations=1)["baseline_comparison"]
    assert list(comparison["modes"]) == ["plain", "hf"]
    assert comparison["token_ids"]["verdict"] in ("identical", "ties")


def test_local_mode_judges_its_own_output(one_thread):
    benchmark = BenchmarkRunner(
        "configs/baseline.yaml", "local", eval_perplexity=True, model="inferlab/tiny",
        max_new_tokens=6, do_sample=False, warmup_iterations=0,
    )  # fmt: skip
    stats = benchmark.run_benchmark(PROMPT, iterations=2)
    assert stats["runner_name"] == "LocalBaselineRunner"
    assert (stats["model"], stats["dtype"], stats["device"]) == ("inferlab/tiny", "float32", "cpu")
    assert stats["num_tokens"]["raw"] == [6.0, 6.0]
    # Greedy tokens of a small vocabulary: each the likeliest, so well above chance.
    assert 1.0 < stats["perplexity"]["perplexity"] < 100.0
    assert "acceptance_rate" not in stats


def test_failed_iterations_are_recorded_and_the_rest_counts(monkeypatch):
    calls = iter([None, RuntimeError("NaN logits"), None])
    original = runners.SpecdecRunner.run

    def flaky(self, prompt):
        error = next(calls)
        if error is not None:
            raise error
        return original(self, prompt)

    monkeypatch.setattr(runners.SpecdecRunner, "run", flaky)
    stats = fake(iterations=3).run_benchmark(PROMPT)
    assert len(stats["latency_ms"]["raw"]) == 2
    (failure,) = stats["failures"]
    assert (failure["iteration"], failure["error"]) == (1, "NaN logits")
    assert [row["iteration"] for row in stats["runs"]] == [0, 1, 2]


def test_all_iterations_failing_is_an_error_with_its_reason():
    stats = fake(max_new_tokens=5000).run_benchmark(PROMPT, iterations=2)
    assert stats["error"].startswith("all 2 runs failed; the first: prompt (")
    assert "latency_ms" not in stats
    assert len(stats["failures"]) == 2


def test_generate_is_not_asked_for_more_than_the_context_holds(monkeypatch):
    """Hugging Face itself decodes beyond it, for as long as it is asked."""
    monkeypatch.setattr(runners.hf, "decode", lambda *_, **__: pytest.fail("it would not end"))
    config = SpecdecConfig(max_new_tokens=99_999, draft_mode="none")
    pipeline = SpeculativePipeline(config=config)
    with pytest.raises(ValueError, match=r"max_tokens \(99999\) exceed the context of inferlab"):
        runners.GenerateRunner(pipeline.target, config).run("hi")


def test_interrupt_carries_what_there_is(monkeypatch):
    calls = iter([None, None, KeyboardInterrupt()])
    original = runners.SpecdecRunner.run

    def interrupted(self, prompt):
        error = next(calls)
        if error is not None:
            raise error
        return original(self, prompt)

    monkeypatch.setattr(runners.SpecdecRunner, "run", interrupted)
    with pytest.raises(BenchmarkInterrupted) as caught:
        fake(iterations=9).run_benchmark(PROMPT)
    assert caught.value.stats["interrupted"] is True
    assert len(caught.value.stats["latency_ms"]["raw"]) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mode": "remote"}, "mode is 'remote'"),
        ({"mode": "local", "compare_baseline": True}, "compare_baseline"),
        ({"mode": "http", "eval_perplexity": True}, "eval_perplexity"),
        ({"mode": "local", "stream": True}, "stream"),
        ({"mode": "specdec", "host": "h"}, "host"),
        ({"mode": "specdec", "implementation": "fake", "eval_perplexity": True}, "real model"),
        ({"mode": "specdec", "iterations": 0}, "iterations"),
        ({"mode": "specdec", "no_such_key": 1}, "no_such_key"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        BenchmarkRunner(**arguments)


@pytest.mark.parametrize("prompt", ["", [], ["x", ""]])
def test_bad_prompts(prompt):
    with pytest.raises(ValueError, match="prompt"):
        fake().run_benchmark(prompt)
    with pytest.raises(ValueError, match="iterations"):
        fake().run_benchmark("x", iterations=0)


# --- http ----------------------------------------------------------------------------------------


@pytest.fixture
def server():
    with FaultyServer() as running:
        yield running


@pytest.mark.network
def test_http_mode(server):
    server.answers = [Respond.json(chat())]
    with BenchmarkRunner(
        "configs/vllm.yaml", "http", "127.0.0.1", server.port, warmup_iterations=2
    ) as benchmark:
        stats = benchmark.run_benchmark("Hi", iterations=3)
    assert len(server.posts) == 5
    assert all(request.payload["seed"] == 1234 for request in server.posts)
    assert stats["runner_name"] == "VLLMPingClient"
    assert stats["server"] == server.url
    assert stats["model"] == "llama-2-7b"
    assert stats["num_tokens"]["raw"] == [7.0] * 3
    assert "ttft_ms" not in stats


@pytest.mark.network
def test_http_mode_streams(server):
    events = Respond.events(delta(content="a"), delta(content="b"), delta("stop"))
    server.answers = [events, Respond.events({"error": {"message": "died"}}), events]
    with BenchmarkRunner(
        mode="http", base_url=server.url, stream=True, warmup_iterations=0, seed=5
    ) as benchmark:
        stats = benchmark.run_benchmark("Hi", iterations=3)
    assert len(stats["ttft_ms"]["raw"]) == len(stats["tpot_ms"]["raw"]) == 2
    assert stats["failures"][0]["error"] == "the server reports an error: died"
    assert server.posts[0].payload["seed"] == 5


@pytest.mark.network
def test_http_server_that_only_fails(server):
    server.answers = [Respond(b"no", 400)]
    with BenchmarkRunner(mode="http", base_url=server.url) as benchmark:
        stats = benchmark.run_benchmark("Hi", iterations=2)
    assert stats["error"] == "all 2 runs failed; the first: HTTP 400: no"


@pytest.mark.network
def test_one_answer_that_cannot_be_encoded_loses_nothing(server, capsys, tmp_path):
    """Half of a surrogate pair, in a text and in an error, and JSON nested beyond reason."""
    deep = json.loads("[" * 400 + "]" * 400)
    server.answers = [
        Respond.json(chat("one")), Respond.json(chat("\ud83d")),
        Respond.json({"error": "bad \ud83d"}, 400), Respond.json(chat("two", deep=deep)),
    ]  # fmt: skip
    command = ["--mode", "http", "--base-url", server.url, "--model", "m\u00fc", "--prompt", "Hi"]
    command += ["--iterations", "4", "--warmup", "0", "--output", str(tmp_path / "r")]
    assert main([*command, "--json"]) == 1
    stats = json.loads(capsys.readouterr().out)
    assert [result["generated_text"] for result in stats["raw_results"]] == ["one", "\ufffd", "two"]
    assert [failure["error"] for failure in stats["failures"]] == ["HTTP 400: bad \ufffd"]
    kept = stats["raw_results"][1]["raw_response"]["choices"][0]["message"]["content"]
    assert kept == "\ud83d"
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == stats
    assert len((tmp_path / "r.csv").read_text(encoding="utf-8").splitlines()) == 5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.csv", "r.html", "r.json", "r.md"]


@pytest.mark.parametrize("more", [["--json"], []])
def test_what_cannot_be_written_is_printed(server, capsys, tmp_path, monkeypatch, more):
    monkeypatch.setattr(result_files, "check_output", lambda path: None)
    server.answers = [Respond.json(chat())]
    (tmp_path / "r.json").mkdir()
    command = ["--mode", "http", "--base-url", server.url, "--prompt", "Hi", "--iterations", "1"]
    assert main([*command, "--warmup", "0", "--output", str(tmp_path / "r"), *more]) == 2
    out, err = capsys.readouterr()
    assert "first" in out
    assert "r.json cannot be written" in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.json", "r.json.part"]


def test_http_server_that_is_not_there(capsys):
    with closed_port() as port:
        with BenchmarkRunner(mode="http", port=port) as benchmark:
            stats = benchmark.run_benchmark("Hi")
        assert stats["error"] == f"Server not reachable: http://127.0.0.1:{port}"
        assert main(["--mode", "http", "--port", str(port), "--prompt", "Hi"]) == 1
    assert "Server not reachable" in capsys.readouterr().err


# --- the command ---------------------------------------------------------------------------------

FAKE = ["--mode", "specdec", "--impl", "fake", "--max-tokens", "8", "--warmup", "0"]


def test_command_prints_tables(capsys):
    code = main([*FAKE, "--prompt", PROMPT, "--iterations", "2", "--compare-baseline"])
    out = capsys.readouterr().out
    assert code == 0
    assert "tokens per second" in out
    assert "95 % of median" in out
    assert "x plain" in out
    assert "token ids: identical for 1 prompts (specdec, plain)" in out


def test_command_writes_json_and_csv(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"turns": ["two", "x"]}\n{"prompt": "three"}\n')
    prefix = tmp_path / "result"
    arguments = ["--prompts", str(prompts), "--num-prompts", "2", "--iterations", "2", "--json"]
    code = main([*FAKE, *arguments, "--compare-baseline", "--output", str(prefix)])
    printed = json.loads(capsys.readouterr().out)
    assert code == 0
    assert printed["prompts"] == ["one", "two"]
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == printed
    with (tmp_path / "result.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    assert {row["mode"] for row in rows} == {"specdec", "plain"}
    for row, run in zip(rows, written["runs"], strict=True):
        assert float(row["latency_ms"]) == run["latency_ms"]
        assert int(row["num_tokens"]) == 8
        assert row["error"] == ""


def test_command_takes_heldout_prompts(capsys):
    assert main([*FAKE, "--heldout", "3", "--iterations", "1", "--json"]) == 0
    assert len(set(json.loads(capsys.readouterr().out)["prompts"])) == 3


def test_command_fails_when_ids_differ(capsys, monkeypatch):
    original = runners.SpecdecRunner.run

    def broken(self, prompt):
        result = original(self, prompt)
        if self.pipeline.config.draft_mode != "none":
            result["token_ids"] = result["token_ids"][:-1]
        return result

    monkeypatch.setattr(runners.SpecdecRunner, "run", broken)
    assert main([*FAKE, "--prompt", "x", "--iterations", "1", "--compare-baseline"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_command_tells_why_all_runs_failed(capsys):
    assert main([*FAKE, "--prompt", "x", "--max-tokens", "5000", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"].startswith("all 5 runs failed")
    assert "error: all 5 runs failed" in err


@pytest.mark.parametrize("more", [[], ["--modes", "ngram"], ["--modes", "ngram", "--batch", "3"]])
def test_prompts_that_cannot_be_run_fail_alone(tmp_path, capsys, more):
    file = tmp_path / "p.jsonl"
    texts = ["one", "x \ud83d y", "", "two", "word " * 5000]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    fake = [*FAKE, "--prompts", str(file), "--iterations", "1", *more]
    command = fake[2:] if more else fake
    assert main([*command, "--json", "--output", str(tmp_path / "r")]) == 1
    stats = json.loads(capsys.readouterr().out)
    errors = {failure["where"]: failure["error"] for failure in stats["failures"]}
    assert list(errors) == [f"{file}:{line}" for line in (2, 3, 5)]
    assert "half of a surrogate pair" in errors[f"{file}:2"]
    if not more:
        assert [run["prompt_index"] for run in stats["raw_results"]] == [0, 3]
    else:
        assert [found["prompts"] for found in stats["token_ids"].values()] == [2]
    assert json.loads((tmp_path / "r.json").read_text()) == stats
    assert not (tmp_path / "r.json.part").exists()
    assert main(command) == 1
    captured = capsys.readouterr()
    for line in (2, 3, 5):
        assert f"{file}:{line}" in captured.out
        assert f"{file}:{line}" in captured.err, "the log names the line"
    assert "prompt 1" not in captured.err


@pytest.mark.parametrize("more", [[], ["--modes", "ngram", "--batch", "2"]])
def test_runs_are_in_the_journal_until_the_file_is_written(tmp_path, monkeypatch, capsys, more):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "", "two")))

    def full(path, payload):
        raise UsageError("--output: the disk is full")

    monkeypatch.setattr(result_files, "write_json", full)
    fake = FAKE[2:] if more else FAKE
    words = [*fake, *more, "--prompts", str(file), "--iterations", "2"]
    assert main([*words, "--output", str(tmp_path / "r")]) == 2
    journal = tmp_path / "r.json.part"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(rows) == (4 if more else 6)
    assert [row["iteration"] for row in rows] == sorted(row["iteration"] for row in rows)
    assert all(row["result"]["num_tokens"] for row in rows if "error" not in row)
    captured = capsys.readouterr()
    assert f"what was finished is in {journal}" in captured.err
    assert captured.err.splitlines()[-1] == "error: --output: the disk is full"
    assert "one" in captured.out or "plain" in captured.out, "and is printed all the same"


def test_empty_answers_of_a_server_are_results(capsys, monkeypatch):
    """As `inferlab ping` counts them: success, zero tokens."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FaultyServer() as server:
        nothing = chat("", usage={"completion_tokens": 0})
        server.answers = [Respond.json(nothing), Respond.json(chat())]
        words = ["--mode", "http", "--host", "127.0.0.1", "--port", str(server.port)]
        words += ["--prompt", "Hi", "--iterations", "2", "--warmup", "0"]
        assert main([*words, "--json"]) == 0
        stats = json.loads(capsys.readouterr().out)
        server.answers = [Respond.events(delta(finish_reason="stop"), "data: [DONE]\n\n")]
        assert main([*words, "--stream"]) == 0
    assert stats["failures"] == []
    assert stats["num_tokens"]["raw"] == [0.0, 7.0]
    assert len(stats["ms_per_token"]["raw"]) == 1
    assert "tokens per second" in capsys.readouterr().out


def test_a_prefix_that_is_no_file(tmp_path, capsys):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "r.csv").mkdir()
    assert main([*FAKE, "--prompt", "x", "--output", str(fifo)]) == 2
    assert (
        "is no file; PREFIX.json, PREFIX.csv, PREFIX.md and PREFIX.html are written"
        in capsys.readouterr().err
    )
    assert main([*FAKE, "--prompt", "x", "--output", str(tmp_path / "r")]) == 2
    assert "r.csv is a directory" in capsys.readouterr().err
    for folder in (".", "..", "/"):
        assert main([*FAKE, "--prompt", "x", "--output", folder]) == 2
        assert f"--output: {folder} is a directory; give a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", "x", "--K", "4"], "--K: has no meaning in --mode local, only in specdec"),
        (["--prompt", "x", "--mode", "http", "--compare-baseline"], "--compare-baseline: has no"),
        (["--prompt", "x", "--mode", "specdec", "--port", "1"], "--port: has no meaning"),
        (["--prompt", "x", "--mode", "specdec", "--model", "m"], "only in local and http"),
        (["--prompt", "x", "--mode", "local", "--stream"], "--stream: has no meaning"),
        (["--mode", "http", "--peers", "hf"], "--peers: has no meaning in --mode http"),
        (["--mode", "local", "--modes", "all"], "--modes: has no meaning in --mode local"),
        (["--mode", "http", "--quantization-matrix"], "--quantization-matrix: has no meaning in"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--prompt", "x", "--iterations", "0"], "--iterations: 0 is not allowed"),
        (["--prompt", "x", "--warmup", "-1"], "--warmup: -1 is not allowed"),
        (["--heldout", "0"], "--heldout: 0 is not allowed"),
        (["--prompt", "x", "--num-prompts", "2"], "--num-prompts: limits --prompts"),
        (["--prompts", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--prompt", "x", "--output", "no/such/dir/x"], "--output"),
        (["--prompt", "x", "--mode", "http", "--port", "0"], "--port: 0 is not allowed"),
        ([*FAKE, "--prompt", "x", "--eval-perplexity"], "real model"),
    ],
)
def test_bad_flags(arguments, named, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert len(err.strip().splitlines()) == 1


def test_ctrl_c_keeps_partial_results(tmp_path):
    """A real SIGINT to a real process, in the middle of far too many runs."""
    prefix = tmp_path / "partial"
    command = [sys.executable, "-m", "inferlab.benchmarks.run_bench", *FAKE, "--prompt", "x"]
    command += ["--iterations", "1000000", "--verbose", "--output", str(prefix)]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=dict(os.environ),
            # Background jobs of a shell ignore SIGINT, and their children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        deadline = time.monotonic() + 60
        while log.read_text().count(" tokens in ") < 3:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: these are partial results" in out
    assert "tokens per second" in out
    stats = json.loads((tmp_path / "partial.json").read_text())
    assert stats["interrupted"] is True
    assert len(stats["latency_ms"]["raw"]) >= 3
    assert (tmp_path / "partial.csv").read_text().count("\nspecdec,") == len(stats["runs"])
