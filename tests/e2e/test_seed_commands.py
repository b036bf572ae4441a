"""The command lines and the Python examples that users were promised, offline, as they are written.

The hub's models come out of a hub cache that the tests generate. Commands that need a server are
tested with the server's client.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.hub_cache import write_hub_cache

DRIVER = Path(__file__).with_name("run_commands.py")

BASELINE = """
python -m inferlab.server.local_baseline --prompt "Hello, world!"
python -m inferlab.server.local_baseline --prompt "The future of AI is" --max-tokens 100 --verbose
python -m inferlab.server.local_baseline --config configs/baseline.yaml --prompt "Test"
"""

SPECDEC = """
python -m inferlab.specdec.run_specdec --prompt "Explain KV cache simply." --max-tokens 64 --verbose
python -m inferlab.specdec.run_specdec --config configs/specdec.yaml --prompt "Test" --seed 42
python -m inferlab.specdec.run_specdec --prompt "Explain KV cache simply." --max-tokens 64 --impl fake
python -m inferlab.specdec.run_specdec --prompt "Test" --K 8 --policy conf_threshold --tau 0.7 --impl fake
python -m inferlab.specdec.run_specdec --prompt "Test" --adaptive-K --min-k 1 --max-k 8 --impl fake
python -m inferlab.specdec.run_specdec --config configs/specdec.yaml --prompt "Test" --impl fake
python -m inferlab.specdec.run_specdec --prompt "Test real inference" --max-tokens 20 --impl hf --force-device cpu
python -m inferlab.specdec.run_specdec --prompt "Test" --base-model sshleifer/tiny-gpt2 --draft-model sshleifer/tiny-gpt2 --impl hf
python -m inferlab.specdec.run_specdec --config configs/specdec_hf.yaml --prompt "Test" --impl hf
python -m inferlab.specdec.run_specdec --prompt "Test" --policy topk_agree --k 5 --impl fake
python -m inferlab.specdec.run_specdec --prompt "Test" --policy typical --p 0.9 --impl fake
python -m inferlab.specdec.run_specdec --prompt "Test" --controller adaptive --target-acceptance 0.7 --impl fake
"""  # noqa: E501

BENCH = """
python -m inferlab.benchmarks.run_bench --prompt "Hello, world!" --iterations 5 --mode local
python -m inferlab.benchmarks.run_bench --mode specdec --prompt "Why speculative decoding helps?" --iterations 3
python -m inferlab.benchmarks.run_bench --mode specdec --compare-baseline --prompt "Test comparison" --iterations 3
python -m inferlab.benchmarks.run_bench --prompt "Compare performance" --mode local --iterations 5
python -m inferlab.benchmarks.run_bench --mode specdec --eval-perplexity --prompt "Quality test" --iterations 3
python -m inferlab.benchmarks.run_bench --config configs/baseline.yaml --prompt "Test" --mode local
python -m inferlab.benchmarks.run_bench --config configs/specdec.yaml --prompt "Test" --mode specdec
"""  # noqa: E501

# Each is run a second time with --json, and its JSON is looked at.
JSON_COMMANDS = [
    "python -m inferlab.cli baseline --prompt Hello --max-tokens 8 --temperature 0",
    "python -m inferlab.cli specdec --prompt Hello --max-tokens 8",
    "python -m inferlab.cli specdec --prompt Hello --max-tokens 8 --draft-mode none",
    "python -m inferlab.cli specdec --prompt Hello --max-tokens 8 --draft-mode ngram --tree 2,1",
    "python -m inferlab.cli specdec --config configs/specdec_hf.yaml --prompt Test",
]

EXAMPLE = """
from inferlab.benchmarks.run_bench import BenchmarkRunner
from inferlab.server.local_baseline import LocalBaselineRunner
from inferlab.specdec.pipeline import SpeculativePipeline

runner = LocalBaselineRunner(config_path="configs/baseline.yaml")
result = runner.run("Hello, world!", max_new_tokens=50)
print(f"Generated: {result['text']}")
print(f"Latency: {result['latency_ms']:.2f} ms")

pipeline = SpeculativePipeline(config_path="configs/specdec.yaml")
result = pipeline.generate("Explain KV cache simply.", max_tokens=64)
print(f"Generated: {result['text']}")
print(f"Latency: {result['latency_ms']:.2f} ms")
print(f"Acceptance Rate: {result['acceptance_rate']:.3f}")

benchmark = BenchmarkRunner(config_path="configs/baseline.yaml", mode="local")
stats = benchmark.run_benchmark("Hello, world!", iterations=2)
benchmark.print_summary(stats)

specdec_benchmark = BenchmarkRunner(
    config_path="configs/specdec.yaml", mode="specdec", compare_baseline=True
)
stats = specdec_benchmark.run_benchmark("Why speculative decoding helps?", iterations=2)
specdec_benchmark.print_summary(stats)

for mode in ("medusa", "eagle"):
    pipeline = SpeculativePipeline(draft_mode=mode)
    result = pipeline.generate("Explain KV cache simply.", max_tokens=64)
    print(f"{mode}: {result['mean_accepted_length']:.2f}")
"""


def lines(block: str) -> list[str]:
    return block.strip().splitlines()


SEED_COMMANDS = [*lines(BASELINE), *lines(SPECDEC), *lines(BENCH)]
WITH_JSON = [f"{command} --json" for command in JSON_COMMANDS]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    home = tmp_path_factory.mktemp("hf_home")
    write_hub_cache(home)
    return {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def outcomes(environment, tmp_path_factory):
    """Command -> what it did, all run from a directory with no configs/ in it."""
    commands = [*SEED_COMMANDS, *WITH_JSON, EXAMPLE]
    done = subprocess.run(
        [sys.executable, str(DRIVER)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("command", SEED_COMMANDS)
def test_command_of_the_seed(outcomes, command):
    outcome = outcomes[command]
    assert outcome["code"] == 0, outcome["stderr"]
    assert "Traceback" not in outcome["stderr"]
    assert ("benchmark (" if "run_bench" in command else "tokens/s") in outcome["stdout"]


def test_baseline_prints_the_prompt_and_specdec_what_follows(outcomes):
    assert outcomes[lines(BASELINE)[0]]["stdout"].startswith("Hello, world!")
    assert "facebook/opt-125m" in outcomes[lines(BASELINE)[2]]["stdout"]
    assert "acceptance" in outcomes[lines(SPECDEC)[0]]["stdout"]


def test_benchmarks_print_what_their_flags_ask_for(outcomes):
    commands = lines(BENCH)
    compared = next(outcomes[c] for c in commands if "--compare-baseline" in c)
    assert "Hugging Face generate" in compared["stdout"]
    assert "token ids: identical" in compared["stdout"]
    evaluated = next(outcomes[c] for c in commands if "--eval-perplexity" in c)
    assert "perplexity: " in evaluated["stdout"]


@pytest.mark.parametrize("command", WITH_JSON)
def test_json_is_alone_on_stdout(outcomes, command):
    outcome = outcomes[command]
    assert outcome["code"] == 0, outcome["stderr"]
    assert outcome["stdout"].count("\n") == 1
    result = json.loads(outcome["stdout"])
    assert result["num_tokens"] == len(result["token_ids"])
    assert {"text", "latency_ms", "tokens_per_second", "device", "dtype"} <= set(result)


def test_json_has_what_scripts_rely_on(outcomes):
    result = json.loads(outcomes[WITH_JSON[1]]["stdout"])
    ours = {
        "text", "token_ids", "num_tokens", "latency_ms", "tokens_per_second", "acceptance_rate",
        "mean_accepted_length", "acceptance_by_position", "target_forwards", "timings_ms",
    }  # fmt: skip
    seeds = {
        "latency_ms", "proposed", "accepted", "acceptance_rate", "tokens_per_sec", "text", "impl",
        "device", "base_model", "draft_model", "draft_mode", "dtype", "generated_tokens", "steps",
        "verification_time_ms", "generation_time_ms", "mem_rss_mb", "policy", "controller",
    }  # fmt: skip
    assert ours | seeds <= set(result)
    assert (result["base_model"], result["impl"]) == ("inferlab/tiny", "hf")
    assert set(result["timings_ms"]) >= {"draft", "verify", "accept", "commit", "rest"}


def test_the_tokens_are_those_of_plain_decoding_and_of_generate(outcomes):
    baseline, vanilla, plain, ngram = (json.loads(outcomes[c]["stdout"]) for c in WITH_JSON[:4])
    assert vanilla["token_ids"] == plain["token_ids"] == ngram["token_ids"]
    assert vanilla["token_ids"] == baseline["token_ids"]


def test_python_example(outcomes):
    outcome = outcomes[EXAMPLE]
    assert outcome["code"] == 0, outcome["stderr"]
    printed = outcome["stdout"]
    assert "Generated: Hello, world!" in printed
    assert "Acceptance Rate: " in printed
    for mode in ("medusa", "eagle"):
        accepted_length = float(printed.split(f"{mode}: ")[1].split()[0])
        assert accepted_length >= 1.0  # what was drafted is what paid


def test_ctrl_c_keeps_the_prompts_that_are_done(environment, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Explain KV cache simply."}\n' * 100_000)
    output = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "inferlab.cli", "specdec", "--impl", "fake", "--max-tokens", "8",
        "--prompts", str(prompts), "--output", str(output), "--json", "--verbose",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if " 3 of 100000 prompts done" in line:
                break
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    payload = json.loads(stdout)
    assert payload["summary"]["interrupted"] is True
    assert 3 <= len(payload["results"]) < 100_000
    assert payload["results"][0]["num_tokens"] == 8
    assert json.loads(output.read_text()) == payload
    assert "Traceback" not in stderr
