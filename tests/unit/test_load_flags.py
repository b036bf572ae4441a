"""The flags of a load: what they mean, and where they have no meaning."""

from __future__ import annotations

import pytest

from inferlab import cli
from inferlab.cli.load_flags import arrivals_of, budget_of, extra_body_of, first_load_flag, slos_of
from inferlab.load.arrivals import Arrivals
from inferlab.load.plan import ErrorBudget

HTTP = ("bench", "--mode", "http", "--prompt", "Hi")


def parsed(*words: str):
    return cli.make_parser().parse_args(["bench", "--mode", "http", *words])


@pytest.mark.parametrize(
    ("words", "arrivals"),
    [
        (("--concurrency", "3"), Arrivals("closed")),
        (("--rate", "2"), Arrivals("poisson", rate=2.0)),
        (("--rate", "2", "--load-seed", "5"), Arrivals("poisson", rate=2.0, seed=5)),
        (("--rate", "2", "--arrival", "constant"), Arrivals("constant", rate=2.0)),
        (("--rate", "2", "--burstiness", "0.5"), Arrivals("gamma", rate=2.0, shape=0.5)),
        (("--rate", "2", "--burst", "4"), Arrivals("burst", rate=2.0, burst=4)),
        (
            ("--ramp", "1:8", "--duration", "30"),
            Arrivals("ramp", rate=1.0, rate_end=8.0, ramp_s=30.0),
        ),
    ],
)
def test_arrivals(words, arrivals):
    assert arrivals_of(parsed(*words)) == arrivals


def test_slos_budgets_and_more_keys():
    args = parsed("--slo", "ttft=200", "--slo", "tpot=20.5", "--extra-body", '{"top_k": 3}')
    assert slos_of(args) == {"ttft": 200.0, "tpot": 20.5}
    assert extra_body_of(args) == {"top_k": 3}
    assert budget_of(args) == ErrorBudget(0)
    assert budget_of(parsed("--error-budget", "3")) == ErrorBudget(3)
    assert budget_of(parsed("--error-budget", "2.5%")) == ErrorBudget(share=0.025)
    assert ErrorBudget(share=0.025).holds(1, 40)
    assert not ErrorBudget(share=0.025).holds(2, 40)


def test_without_a_flag_of_a_load_it_is_none():
    assert first_load_flag(parsed("--prompt", "x", "--stream", "--iterations", "2")) is None
    assert first_load_flag(parsed("--retries", "0")) == "--retries"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--concurrency", "0"), "--concurrency: 0 is not allowed"),
        (("--rate", "-1"), "--rate: -1 is not allowed"),
        (("--rate", "1e-320", "--duration", "1"), "--rate: 9.99989e-321 is not allowed"),
        (("--rate", "1", "--burstiness", "1e-200"), "--burstiness: 1e-200 is not allowed"),
        (("--ramp", "1e-300:1", "--duration", "1"), "--ramp: '1e-300:1' is not allowed"),
        (("--concurrency", "2", "--requests", "9" * 20), f"--requests: {'9' * 20} is not allowed"),
        (("--retries", "-1"), "--retries: -1 is not allowed"),
        (("--stall-timeout", "nan"), "--stall-timeout: nan is not allowed"),
        (("--arrival", "constant"), "--arrival: has a meaning with --rate only"),
        (("--burst", "2"), "--burst: has a meaning with --rate only"),
        (("--burstiness", "2"), "--burstiness: has a meaning with --rate only"),
        (("--ramp", "1:2"), "--ramp: has a meaning with --duration only"),
        (("--num-prompts", "2", "--retries", "1"), "--num-prompts: has a meaning with --prompts"),
        (("--load-seed", "2"), "--load-seed: has a meaning with --rate or --synthetic or"),
        (("--turns", "2"), "--turns: has a meaning with --synthetic only"),
        (("--shared-prefix", "9"), "--shared-prefix: has a meaning with --synthetic only"),
        (("--rate", "1", "--ramp", "1:2", "--duration", "1"), "--ramp: has no meaning with --rate"),
        (("--rate", "1", "--burst", "2", "--burstiness", "2"), "--burst: has no meaning with"),
        (("--rate", "1", "--burst", "2", "--sweep"), "--burst: has no meaning with --sweep"),
        (("--ramp", "0:2", "--duration", "1"), "--ramp: '0:2' is not allowed"),
        (("--ramp", "up", "--duration", "1"), "--ramp: 'up' is not allowed"),
        (("--slo", "speed=1"), "--slo: 'speed=1' is not allowed"),
        (("--slo", "ttft"), "--slo: 'ttft' is not allowed"),
        (("--error-budget", "many"), "--error-budget: 'many' is not allowed"),
        (("--error-budget", "200%"), "--error-budget: '200%' is not allowed"),
        (("--error-budget", "-1"), "--error-budget: '-1' is not allowed"),
        (("--extra-body", "{"), "--extra-body: is not JSON"),
        (("--extra-body", "[1]"), "--extra-body: must be a JSON object"),
        (("--extra-body", '{"seed": "x"}'), "--extra-body: 'seed' is for --seed"),
        (("--extra-body", '{"n": 2}'), "--extra-body: n is 2; a request has one answer"),
        (("--concurrency", "2", "--processes", "3"), "--processes: 3 is not allowed"),
        (("--processes", "2"), "--processes: 2 is not allowed"),
        (("--concurrency", "2", "--iterations", "3"), "--iterations: has no meaning with"),
        (("--concurrency", "2", "--modes", "all"), "--modes: has no meaning with"),
        (("--concurrency", "2", "--peers", "hf"), "--peers: has no meaning with --concurrency"),
        (("--concurrency", "2", "--peer-models", "x"), "--peer-models: belongs to --peers"),
        (("--concurrency", "2", "--batch", "2"), "--batch: has no meaning with"),
        (("--concurrency", "2", "--conversations", "x"), "--conversations: has no meaning with"),
    ],
)
def test_what_has_no_meaning_is_refused(capsys, words, said):
    assert cli.main([*HTTP, "--model", "m", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["local", "specdec"])
def test_other_modes_know_no_load(capsys, mode):
    assert cli.main(["bench", "--mode", mode, "--prompt", "Hi", "--rate", "2"]) == 2
    assert f"--rate: has no meaning in --mode {mode}, only in http" in capsys.readouterr().err


def test_something_must_be_sent(capsys):
    assert cli.main(["bench", "--mode", "http", "--model", "m", "--concurrency", "2"]) == 2
    assert "what is sent is missing; give --conversations" in capsys.readouterr().err


def test_texts_of_given_lengths_need_a_tokenizer(capsys):
    words = ["bench", "--mode", "http", "--model", "m", "--synthetic", "8,4"]
    assert cli.main(words) == 2
    assert "--synthetic: has a meaning with --tokenizer only" in capsys.readouterr().err
    more = ["--tokenizer", "inferlab/tiny", "--shared-prefix", "x"]
    assert cli.main([*words, *more]) == 2
    assert "--shared-prefix: 'x' is not allowed" in capsys.readouterr().err


def test_a_file_without_times_is_no_trace(capsys, tmp_path):
    file = tmp_path / "file.jsonl"
    file.write_text('{"prompt": "x"}\n')
    words = ["bench", "--mode", "http", "--model", "m", "--trace", str(file)]
    assert cli.main(words) == 2
    assert "has no times; give --conversations" in capsys.readouterr().err
