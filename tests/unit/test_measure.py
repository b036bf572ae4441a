"""The measuring loop and what is made of its runs: order, failures, speedups, token ids, ties."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.tiny_models import tiny_model, tiny_tokenizer
from inferlab.benchmarks.comparison import (
    by_prompt,
    compare_modes,
    figures_of,
    phases_of,
    speedup,
)
from inferlab.benchmarks.divergence import judge_tie
from inferlab.benchmarks.measure import (
    MeasurementError,
    Measurements,
    Run,
    RunnerGone,
    measure,
)
from inferlab.benchmarks.perplexity import log_probabilities, perplexity
from inferlab.benchmarks.token_ids import compare_token_ids
from inferlab.config import SpecdecConfig
from inferlab.kernels.reference.noise import gumbel_row
from inferlab.models import FakeLM, HFModel


class Scripted:
    """A runner that notes who ran and takes ``latencies`` in turn; an exception is raised."""

    name = "Scripted"

    def __init__(self, mode, log, latencies=(10.0,)):
        self.mode, self.log, self.latencies, self.calls = mode, log, latencies, 0

    def run(self, prompt):
        self.log.append((self.mode, prompt))
        latency = self.latencies[self.calls % len(self.latencies)]
        self.calls += 1
        if isinstance(latency, BaseException):
            raise latency
        return {"latency_ms": latency, "num_tokens": 5, "token_ids": [1, 2, 3, 4, 5]}

    def describe(self):
        return {}


# --- the loop ------------------------------------------------------------------------------------


def test_modes_take_turns_and_rotate():
    log: list[tuple[str, str]] = []
    runners = {mode: Scripted(mode, log) for mode in "abc"}
    advanced: list[int] = []
    measured = measure(runners, ["p", "q"], iterations=2, warmup=1, on_run=advanced.append)
    assert "".join(mode for mode, _ in log) == "abc" + "abc" + "bca" + "bca" + "cab"
    assert "".join(prompt for _, prompt in log) == "ppp" + "ppp" + "qqq" + "ppp" + "qqq"
    assert sum(advanced) == 15
    assert len(measured.runs) == 12
    assert [run.order for run in measured.runs[:6]] == [0, 1, 2, 0, 1, 2]
    assert {(run.prompt_index, run.iteration) for run in measured.of("b")} == {
        (0, 0), (1, 0), (0, 1), (1, 1),
    }  # fmt: skip


def test_each_mode_stands_in_each_place_of_each_prompt_equally_often():
    runners = {mode: Scripted(mode, []) for mode in "abc"}
    measured = measure(runners, ["p", "q", "r"], iterations=3, warmup=0)
    for mode in "abc":
        for prompt in range(3):
            assert sorted(run.order for run in measured.of(mode, prompt)) == [0, 1, 2]


def test_a_failed_run_is_kept_as_a_failure_and_others_go_on():
    runners = {"a": Scripted("a", [], [1.0, RuntimeError("NaN logits"), 3.0])}
    measured = measure(runners, ["p"], iterations=3, warmup=0)
    assert [run.error for run in measured.runs] == [None, "NaN logits", None]
    assert [run.row()["latency_ms"] for run in measured.of("a")] == [1.0, 3.0]
    assert measured.failures() == [measured.runs[1]]
    assert measured.runs[1].row() == {
        "mode": "a", "prompt_index": 0, "iteration": 1, "order": 0, "error": "NaN logits",
    }  # fmt: skip


class Silent(Scripted):
    def run(self, prompt):
        return {**super().run(prompt), "num_tokens": 0, "token_ids": []}


def test_a_run_without_tokens_is_a_result():
    """The model had nothing to say; nobody else's figures suffer from that."""
    runners = {"a": Silent("a", []), "b": Scripted("b", [])}
    measured = measure(runners, ["p"], iterations=2, warmup=0)
    assert measured.failures() == []
    row = measured.of("a")[0].row()
    assert (row["num_tokens"], row["tokens_per_second"]) == (0, 0.0)
    assert "ms_per_token" not in row
    assert "ms_per_token" not in figures_of(measured, "a")
    assert by_prompt(measured, "a", 1) == [
        {"prompt_index": 0, "iterations": 2, "latency_ms": 10.0, "tokens_per_second": 0.0}
    ]
    assert speedup(measured, "a", "b", 1) is None
    assert speedup(measured, "b", "a", 1) is None
    timed = Run("c", 0, 0, 0, {"latency_ms": 1.0, "num_tokens": 0, "timings_ms": {"draft": 1.0}})
    assert phases_of(Measurements([timed]), "c") == {}


def test_a_run_that_took_no_time_is_a_failure():
    measured = measure({"a": Scripted("a", [], [0.0])}, ["p"], iterations=1, warmup=0)
    assert measured.runs[0].error == "the clock stood still"


def test_messages_name_the_prompt(caplog):
    class Batched(Scripted):
        def run(self, prompt):
            result = super().run(prompt)
            return {**result, "errors": {1: "NaN"}} if prompt == ("q", "r") else result

    errors = [MeasurementError("x", {0: "x", 1: "y"}), None, RuntimeError("broken"), 1.0]
    runners = {"a": Batched("a", [], [e or 1.0 for e in errors])}
    names = [["f:1", "f:2"], ["f:3", "f:5"]]
    measured = measure(runners, [("o", "p"), ("q", "r")], iterations=1, warmup=2, names=names)
    assert caplog.messages == [
        "f:1, a, warm-up 0: x",
        "f:2, a, warm-up 0: y",
        "f:1, f:2, a, iteration 0: broken",
        "f:5, a, iteration 0: NaN",
    ]
    assert [run.error for run in measured.runs] == ["broken", None]
    assert [run.errors for run in measured.runs] == [{}, {1: "NaN"}]


def test_each_run_is_kept_as_it_is_made():
    kept = []
    runners = {"a": Scripted("a", [], [1.0, RuntimeError("no"), KeyboardInterrupt()])}
    measured = measure(runners, ["p"], iterations=9, warmup=0, keep=kept.append)
    assert kept == measured.runs
    assert len(kept) == 2


def test_nothing_to_measure_is_no_error():
    assert measure({"a": Scripted("a", [])}, [], iterations=2, warmup=1).runs == []


def test_ctrl_c_keeps_what_there_is():
    runners = {"a": Scripted("a", [], [1.0, 2.0, KeyboardInterrupt()])}
    measured = measure(runners, ["p"], iterations=9, warmup=1)
    assert measured.interrupted is True
    assert [run.row()["latency_ms"] for run in measured.runs] == [2.0]


def test_an_error_of_the_program_is_named_and_loses_no_other_run():
    runners = {"a": Scripted("a", [], [1.0, TypeError("bug"), 2.0])}
    measured = measure(runners, ["p"], iterations=3, warmup=0)
    first, failed, last = (run.error for run in measured.runs)
    assert first is last is None
    assert failed.startswith("TypeError: bug")


# --- figures and speedups ------------------------------------------------------------------------


def _runs(mode, latencies):
    """Runs of 10 tokens; latencies[prompt][iteration] in ms."""
    return [
        Run(mode, p, i, 0, {"latency_ms": ms, "num_tokens": 10})
        for p, row in enumerate(latencies)
        for i, ms in enumerate(row)
    ]


def test_figures_and_medians_by_prompt():
    measured = Measurements(_runs("a", [[10.0, 20.0, 90.0], [5.0]]))
    measured.runs.append(Run("a", 1, 1, 0, error="no"))
    figures = figures_of(measured, "a")
    assert figures["latency_ms"]["raw"] == [10.0, 20.0, 90.0, 5.0]
    assert figures["ms_per_token"]["median"] == 1.5
    assert figures["tokens_per_second"]["max"] == 2000.0
    assert "ttft_ms" not in figures
    entries = by_prompt(measured, "a", 3)
    assert [entry["prompt_index"] for entry in entries] == [0, 1]
    assert [entry["iterations"] for entry in entries] == [3, 1]
    assert entries[0]["latency_ms"] == 20.0
    assert figures_of(measured, "b") == {}


def test_speedup_uses_the_iterations_that_both_have():
    measured = Measurements(_runs("fast", [[5.0, 5.0], [4.0, 4.0]]) + _runs("slow", [[10.0, 10.0]]))
    measured.runs.append(Run("slow", 1, 0, 0, error="no"))
    measured.runs += [Run("slow", 1, 1, 0, {"latency_ms": 16.0, "num_tokens": 10})]
    found = speedup(measured, "fast", "slow", 2)
    # 2000 and 2500 tok/s against 1000 and 625: medians 2250 and 812.5.
    assert found["ratio"] == pytest.approx(2250 / 812.5)
    assert found["by_group"] == pytest.approx([2.0, 4.0])
    assert speedup(measured, "fast", "nobody", 2) is None


def test_comparison_names_the_baseline():
    times = {"specdec": 5.0, "plain": 10.0, "hf": 20.0}
    runs = [run for mode, ms in times.items() for run in _runs(mode, [[ms, ms]])]
    comparison = compare_modes(Measurements(runs), ["specdec", "plain", "hf"], 1)
    assert comparison["speedup_vs_plain"]["ratio"] == 2.0
    assert comparison["speedup_vs_hf"]["ratio"] == 4.0
    assert comparison["baseline"] == "hf"
    assert comparison["latency_ms"]["median"] == 20.0
    assert list(comparison["modes"]) == ["specdec", "plain", "hf"]


# --- token ids -----------------------------------------------------------------------------------

GREEDY = SpecdecConfig()
PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def target():
    return HFModel(tiny_model("llama"), tiny_tokenizer())


def _compare(ids_by_mode, target, config=GREEDY):
    runs = [
        Run(mode, 0, iteration, 0, {"latency_ms": 1.0, "num_tokens": len(ids), "token_ids": ids})
        for mode, all_ids in ids_by_mode.items()
        for iteration, ids in enumerate(all_ids)
    ]
    return compare_token_ids(Measurements(runs), [PROMPT], config, target)


def test_equal_ids_are_identical(target):
    found = _compare({"specdec": [[5, 6]], "plain": [[5, 6]], "hf": [[5, 6]]}, target)
    assert found["verdict"] == "identical"
    assert found["identical"] is True
    assert found["compared"] == ["specdec", "plain", "hf"]
    assert found["differences"] == []


def test_a_wrong_token_is_found_with_its_place_and_gap(target):
    logits = _logits(target, [])
    best, worst = int(logits.argmax()), int(logits.argmin())
    found = _compare({"specdec": [[best, 7]], "plain": [[worst, 7]]}, target)
    assert found["verdict"] == "different"
    assert found["identical"] is False
    (difference,) = found["differences"]
    assert difference["modes"] == ["specdec", "plain"]
    assert difference["position"] == 0
    assert difference["token_ids"] == [best, worst]
    assert difference["gap"] == pytest.approx(float(logits.max() - logits.min()), rel=1e-5)
    assert difference["tie"] is False


def test_the_gap_is_that_behind_the_common_tokens(target):
    logits = _logits(target, [9, 4])
    found = _compare({"specdec": [[9, 4, 20]], "hf": [[9, 4, 30]]}, target)
    assert found["differences"][0]["position"] == 2
    gap = abs(float(logits[20] - logits[30]))
    assert found["differences"][0]["gap"] == pytest.approx(gap, rel=1e-4)


def test_a_tie_is_recognised():
    model = tiny_model("llama", seed=3)
    target = HFModel(model, tiny_tokenizer())
    best = int(_logits(target, []).argmax())
    other = 40 if best != 40 else 41
    with torch.no_grad():  # two tokens with the same logit everywhere
        model.get_output_embeddings().weight[other] = model.get_output_embeddings().weight[best]
    found = _compare({"specdec": [[best]], "plain": [[other]]}, target)
    assert found["verdict"] == "ties"
    assert found["differences"][0]["gap"] < 1e-5


def test_a_difference_between_iterations_of_one_mode_is_found(target):
    found = _compare({"plain": [[5, 6], [5, 7]]}, target)
    assert found["differences"][0]["modes"] == ["plain", "plain"]


def test_a_text_that_ends_early_differs(target):
    found = _compare({"specdec": [[5, 6]], "plain": [[5]]}, target)
    assert found["verdict"] == "different"
    assert found["differences"][0]["token_ids"] == [6, None]
    assert found["differences"][0]["tie"] is None


def test_a_sampled_difference_is_judged_with_its_noise(target):
    config = SpecdecConfig(temperature=0.7, seed=11)
    ids = target.tokenizer.encode(PROMPT)
    logits = _logits(target, [9])
    noise = gumbel_row(11, len(ids) + 1, len(logits), 0)
    scores = logits + 0.7 * noise
    found = _compare({"specdec": [[9, 20]], "plain": [[9, 30]], "hf": [[1, 2]]}, target, config)
    assert found["differences"][0]["scores"] == pytest.approx(
        [float(scores[20]), float(scores[30])], rel=1e-4
    )
    assert found["not_compared"] == {"hf": "Hugging Face samples from a noise of its own"}


def test_policies_that_promise_no_tokens_are_not_compared(target):
    ids = {"specdec": [[5]], "plain": [[6]]}
    for config in (
        SpecdecConfig(policy="typical"),
        SpecdecConfig(policy="rejection", temperature=0.7),
    ):
        found = _compare(ids, target, config)
        assert found["verdict"] == "nothing to compare"
        assert found["compared"] == ["plain"]
        assert "specdec" in found["not_compared"]
    assert _compare(ids, target, SpecdecConfig(policy="rejection"))["verdict"] == "different"


def test_a_difference_of_fake_models_is_not_explained():
    found = _compare({"specdec": [[5]], "plain": [[6]]}, FakeLM())
    assert found["verdict"] == "different"
    assert found["differences"][0]["tie"] is None


@pytest.mark.parametrize(
    ("dtype", "size", "step"),
    [
        (torch.float32, 12.0, 8 * 2.0**-23),
        (torch.bfloat16, 12.0, 8 * 2.0**-7),
        (torch.float16, 12.0, 8 * 2.0**-10),
        (torch.bfloat16, 16.0, 16 * 2.0**-7),
        (torch.float32, 0.75, 0.5 * 2.0**-23),
    ],
)
def test_rounding_step(dtype, size, step):
    """The distance of neighbouring numbers: torch's own next number up tells the same."""
    found = judge_tie([size, size - 0.001], size, dtype)
    assert found["rounding_step"] == step
    value = torch.tensor(size, dtype=dtype)
    assert float(torch.nextafter(value, torch.tensor(math.inf, dtype=dtype)) - value) == step


def test_ties_by_dtype():
    assert judge_tie([12.0, 11.9], 12.0, torch.bfloat16)["tie"] is True
    assert judge_tie([12.0, 11.7], 12.0, torch.bfloat16)["tie"] is False
    assert judge_tie([12.0, 11.9999], 12.0, torch.float32)["tie"] is True
    assert judge_tie([12.0, 11.9], 12.0, torch.float32)["tie"] is False


def _logits(target, new_ids):
    ids = target.tokenizer.encode(PROMPT) + new_ids
    with torch.inference_mode(), target.plain() as model:
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


# --- perplexity ----------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_one_token_at_a_time(target):
    prompt, new = [3, 8, 20], [7, 9, 100, 2]
    with target.plain() as model:
        found = log_probabilities(model, prompt, new)
        expected = []
        for i, token in enumerate(new):
            row = model(input_ids=torch.tensor([prompt + new[:i]])).logits[0, -1].double()
            expected.append(row.log_softmax(-1)[token].item())
    assert found == pytest.approx(expected, rel=1e-4)


def test_perplexity_of_generated_text_is_hugging_faces_loss(target):
    prompt, new = [3, 8], list(range(10, 40))
    ids = torch.tensor([prompt + new])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.inference_mode(), target.plain() as model:
        loss = float(model(input_ids=ids, labels=labels).loss)
        found = perplexity(log_probabilities(model, prompt, new))
    assert found == pytest.approx(math.exp(loss), rel=1e-4)


def test_half_logits_are_judged_in_fp32():
    """The log-softmax of bf16 logits, taken in fp32, differs from theirs in bf16 by a percent."""
    row = torch.linspace(-3, 3, 50).to(torch.bfloat16)

    class Constant:
        device = torch.device("cpu")

        def __call__(self, input_ids, use_cache):
            logits = row.expand(1, input_ids.shape[1], -1)
            return type("Output", (), {"logits": logits})

    exact = row.double().log_softmax(-1)
    found = log_probabilities(Constant(), [1, 2], [3, 25, 49])
    assert found == pytest.approx([float(exact[t]) for t in (3, 25, 49)], rel=1e-6)


def test_perplexity_by_hand():
    assert perplexity([math.log(0.25)] * 3) == pytest.approx(4.0)
    assert perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)
    assert perplexity([-math.inf, -1.0]) == math.inf
    with pytest.raises(ValueError, match="at least one"):
        perplexity([])


@pytest.mark.parametrize(("prompt", "new"), [([], [1]), ([1], [])])
def test_perplexity_needs_tokens(target, prompt, new):
    with target.plain() as model, pytest.raises(ValueError, match="at least one"):
        log_probabilities(model, prompt, new)


def test_a_runner_that_is_gone_is_asked_no_more():
    told = []
    runners = {
        "a": Scripted("a", [], [1.0] * 4),
        "b": Scripted("b", [], [1.0, RunnerGone("crashed")]),
        "c": Scripted("c", [], [RunnerGone("never there")]),
    }
    measured = measure(runners, ["p", "q"], iterations=2, warmup=1, on_run=told.append)
    assert [run.mode for run in measured.runs if run.error is None] == ["a"] * 4
    assert [(run.mode, run.error) for run in measured.failures()] == [
        ("c", "never there"),
        ("b", "crashed"),
    ]
    assert sum(told) == 3 * (2 * 2 + 1)
