"""`inferlab bench compare`: what is a difference, what is chance, and what fails in CI."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from inferlab.benchmarks.compare import compare_results
from inferlab.cli import main
from inferlab.errors import UsageError

FEW = ["--max-tokens", "24", "--iterations", "3", "--warmup", "0"]
PROMPTS = ["def add(a, b):", "class Stack:", "import os", "a b a b a b", "for i in range(", "<b>"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A real result: the bundled pair on six prompts, three times each."""
    folder = tmp_path_factory.mktemp("compare")
    prompts = folder / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    words = ["--mode", "specdec", "--prompts", str(prompts), "--controller", "fixed", *FEW]
    assert main(["bench", *words, "--output", str(folder / "a")]) == 0
    return folder / "a.json"


@pytest.fixture
def steady(file):
    """That result as of a quiet machine: the runs of a prompt differ by 1 % at most."""
    stats = json.loads(file.read_text())
    for row in stats["runs"]:
        stretch(row, 10.0 * (1 + row["prompt_index"]) * (1 + 0.005 * row["iteration"]))
    return stats


def stretch(row, latency_ms):
    """A run that took so long."""
    row["latency_ms"] = latency_ms
    row["tokens_per_second"] = row["num_tokens"] / latency_ms * 1e3
    row["ms_per_token"] = latency_ms / row["num_tokens"]
    row["first_token_ms"] = latency_ms / 5


def slower(stats, factor):
    changed = copy.deepcopy(stats)
    for row in changed["runs"]:
        stretch(row, row["latency_ms"] * factor)
    return changed


def accepting(stats, less):
    """One where every request accepted fewer drafts in as many steps."""
    changed = copy.deepcopy(stats)
    for row, result in zip(changed["runs"], changed["raw_results"], strict=True):
        counts = result["record"]["speculation"]["stats"]
        counts["accepted"] -= less
        counts["accepted_at"][0] -= less
        counts["emitted"] -= less
        row["acceptance_rate"] = counts["accepted"] / counts["proposed"]
        row["mean_accepted_length"] = counts["emitted"] / counts["steps"]
    return changed


def verdicts(found, mode="specdec"):
    return {key: metric["verdict"] for key, metric in found["modes"][mode]["metrics"].items()}


def test_a_result_is_as_fast_as_itself(steady):
    found = compare_results(steady, steady)
    assert set(verdicts(found).values()) == {"no difference seen"}
    assert found["regressions"] == []
    assert (found["settings"], found["environment"]) == ([], [])
    assert found["prompts"] == {"a": 6, "b": 6, "shared": 6}
    ids = found["modes"]["specdec"]["token_ids"]
    assert (ids["prompts"], ids["identical"]) == (6, 6)
    for metric in found["modes"]["specdec"]["metrics"].values():
        assert metric["a"] == metric["b"]
        assert metric["p"] == metric["p_corrected"] == 1.0


def test_a_slow_down_is_seen_and_fails_beyond_the_tolerance(steady):
    found = compare_results(steady, slower(steady, 1.1), tolerance=0.05)
    metric = found["modes"]["specdec"]["metrics"]["latency_ms"]
    assert metric["ratio"] == pytest.approx(1.1)
    assert metric["ci95"][0] <= 1.1 <= metric["ci95"][1]
    assert verdicts(found)["latency_ms"] == verdicts(found)["tokens_per_second"] == "slower"
    assert verdicts(found)["mean_accepted_length"] == "no difference seen"
    assert [text.split(" went")[0] for text in found["regressions"]] == [
        "specdec: tokens per second", "specdec: latency, ms", "specdec: first token, ms",
    ]  # fmt: skip
    allowed = compare_results(steady, slower(steady, 1.1), tolerance=0.2)
    assert verdicts(allowed)["latency_ms"] == "slower"
    assert allowed["regressions"] == []


def test_a_speed_up_is_no_regression(steady):
    found = compare_results(slower(steady, 1.3), steady)
    assert verdicts(found)["tokens_per_second"] == "faster"
    assert found["regressions"] == []


def test_noise_is_no_difference(steady):
    """Both as noisy as each other, whatever the noise: of 20 pairs at most 1 is told apart."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(20):
        pair = [copy.deepcopy(steady), copy.deepcopy(steady)]
        for stats in pair:
            for row in stats["runs"]:
                stretch(row, row["latency_ms"] * rng.lognormal(0.0, 0.3))
        found = compare_results(*pair, tolerance=0.0)
        alarms += bool(found["regressions"]) or "faster" in verdicts(found).values()
    assert alarms <= 3  # 5 %; more than 3 of 20 has p < 0.02


def test_figures_follow_from_the_rows(steady):
    found = compare_results(steady, slower(steady, 1.07))
    metric = found["modes"]["specdec"]["metrics"]["tokens_per_second"]
    for pair in metric["by_prompt"]:
        index = PROMPTS.index(pair["prompts"][0])
        rows = [r["tokens_per_second"] for r in steady["runs"] if r["prompt_index"] == index]
        assert pair["a"] == np.median(rows)
    assert metric["a"] == np.median([pair["a"] for pair in metric["by_prompt"]])
    assert metric["b"] == np.median([pair["b"] for pair in metric["by_prompt"]])


def test_p_values_are_corrected_together(steady):
    found = compare_results(steady, slower(steady, 1.002))["modes"]["specdec"]["metrics"]
    assert len(found) == 5
    assert any(0 < metric["p"] < metric["p_corrected"] for metric in found.values())


def test_less_acceptance_fails_if_it_depends_on_no_clock(steady):
    found = compare_results(steady, accepting(steady, 1))
    metric = found["modes"]["specdec"]["metrics"]["mean_accepted_length"]
    assert metric["exact"]
    assert metric["verdict"] == "less"
    assert [text.split(" went")[0] for text in found["regressions"]] == [
        "specdec: accepted length (all steps)", "specdec: acceptance rate (all steps)",
    ]  # fmt: skip
    first = found["modes"]["specdec"]["acceptance_by_position"][0]
    assert first["a"] > first["b"]
    assert first["offered"][0] == first["offered"][1] > 0
    assert compare_results(steady, accepting(steady, 1), acceptance_tolerance=0.9)[
        "regressions"
    ] == []  # fmt: skip
    more = compare_results(accepting(steady, 1), steady)
    assert verdicts(more)["acceptance_rate"] == "more"
    assert more["regressions"] == []


def test_what_a_clock_decided_is_judged_by_chance(steady):
    """The controller `cost` drafts by measured times: a fall must be beyond what they vary by."""
    for result in steady["raw_results"]:
        result["record"]["speculation"]["controller"] = {"controller": "cost"}
    worse = accepting(steady, 1)
    assert not compare_results(steady, steady)["modes"]["specdec"]["metrics"]["acceptance_rate"][
        "exact"
    ]  # fmt: skip
    assert len(compare_results(steady, worse)["regressions"]) == 2
    for stats in (steady, worse):
        stats["runs"], stats["raw_results"] = stats["runs"][:1], stats["raw_results"][:1]
    found = compare_results(steady, worse)
    assert verdicts(found)["acceptance_rate"] == "no difference seen", "of a single run each"
    assert found["regressions"] == []


def test_speeds_are_judged_by_times_hugging_face_where_both_have_it(steady):
    """A machine that was half as fast, all of it, is no regression of the build."""
    for row in list(steady["runs"]):
        steady["runs"].append({**row, "mode": "hf"})
        stretch(steady["runs"][-1], row["latency_ms"] * 7)
    drifted = compare_results(steady, slower(steady, 2.0))
    assert drifted["regressions"] == []
    assert verdicts(drifted)["latency_ms"] == verdicts(drifted, "hf")["latency_ms"] == "slower"
    assert verdicts(drifted)["x_hf"] == "no difference seen"
    changed = copy.deepcopy(steady)
    for row in changed["runs"]:
        if row["mode"] == "specdec":
            stretch(row, row["latency_ms"] * 1.2)
    found = compare_results(steady, changed)
    assert found["modes"]["specdec"]["metrics"]["x_hf"]["a"] == pytest.approx(7)
    assert [text.split(" went")[0] for text in found["regressions"]] == ["specdec: x HF generate"]


def test_differences_of_settings_and_machine_are_named(steady):
    other = copy.deepcopy(steady)
    other["max_new_tokens"] = 25
    other["controller"] = {"controller": "fixed", "k": 2}
    other["environment"]["torch"] = "0.1"
    found = compare_results(steady, other)
    assert [one["name"] for one in found["settings"]] == ["controller", "max_new_tokens"]
    assert found["settings"][1] == {"name": "max_new_tokens", "a": "24", "b": "25"}
    assert [one["name"] for one in found["environment"]] == ["torch"]


def test_only_prompts_of_both_are_compared(steady):
    other = copy.deepcopy(steady)
    other["prompts"][0] = "another"
    found = compare_results(steady, other)
    assert found["prompts"]["shared"] == 5
    assert found["modes"]["specdec"]["metrics"]["latency_ms"]["prompts"] == 5
    other["prompts"] = [text + " not" for text in other["prompts"]]
    with pytest.raises(UsageError, match="A and B have no prompt in common"):
        compare_results(steady, other)


def test_token_ids_are_compared(steady):
    other = copy.deepcopy(steady)
    record = other["raw_results"][3]["record"]
    record["token_ids"] = [*record["token_ids"][:4], 0, *record["token_ids"][5:]]
    found = compare_results(steady, other)["modes"]["specdec"]["token_ids"]
    assert (found["prompts"], found["identical"]) == (6, 5)
    (difference,) = found["differences"]
    assert difference["position"] == 4
    assert difference["prompt"] == PROMPTS[3]
    assert difference["token_ids"][1] == 0


def test_more_failures_fail(steady):
    other = copy.deepcopy(steady)
    other["runs"][0] = {"mode": "specdec", "prompt_index": 0, "iteration": 0, "order": 0,
                        "error": "NaN"}  # fmt: skip
    other["failures"] = [other["runs"][0]]
    assert compare_results(steady, other)["regressions"] == ["1 runs failed, 0 before"]
    assert compare_results(other, steady)["regressions"] == []


@pytest.fixture
def files(steady, tmp_path):
    """A result, a slower one, and one that accepts less, as files."""
    made = {"a": steady, "slow": slower(steady, 1.2), "less": accepting(steady, 1)}
    for name, stats in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(stats))
    return {name: str(tmp_path / f"{name}.json") for name in made}


def test_the_exit_status_is_for_ci(files, capsys):
    assert main(["bench", "compare", files["a"], files["a"]]) == 0
    out = capsys.readouterr().out
    assert "settings: the same" in out
    assert "no regression: nothing is slower by more than 5.0%" in out
    assert "token ids: identical for 6 prompts" in out
    assert main(["bench", "compare", files["a"], files["slow"]]) == 1
    out = capsys.readouterr().out
    assert "| latency, ms" in out
    assert "regression: specdec: latency, ms" in out
    assert main(["bench", "compare", files["a"], files["slow"], "--tolerance", "0.3"]) == 0
    assert main(["bench", "compare", files["slow"], files["a"]]) == 0
    assert main(["bench", "compare", files["a"], files["less"]]) == 1
    assert "regression: specdec: acceptance rate" in capsys.readouterr().out


def test_the_comparison_as_files(files, tmp_path, capsys):
    prefix = tmp_path / "c"
    words = ["bench", "compare", files["a"], files["less"], "--output", str(prefix), "--json"]
    assert main(words) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "c.json").read_text())
    assert printed["a"] == files["a"]
    assert "Acceptance by position" in (tmp_path / "c.html").read_text()
    assert "regression: specdec" in (tmp_path / "c.md").read_text()


def test_modes_are_compared_by_batch(tmp_path, capsys):
    words = ["--modes", "vanilla", "--batch", "1,2", "--impl", "fake", "--controller", "fixed"]
    words += ["--prompt", "a b a b", *FEW]
    assert main(["bench", *words, "--output", str(tmp_path / "m")]) == 0
    capsys.readouterr()
    file = str(tmp_path / "m.json")
    assert main(["bench", "compare", file, file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["modes"]) == [
        f"batch {size}, {mode}" for size in (1, 2) for mode in ("vanilla", "plain")
    ]
    assert "acceptance_rate" in found["modes"]["batch 2, vanilla"]["metrics"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A", "--tolerance", "1.5"], "--tolerance: 1.5 is not allowed"),
        (["A", "--acceptance-tolerance", "-1"], "--acceptance-tolerance: -1.0 is not allowed"),
        (["missing.json"], "missing.json: cannot be read"),
        (["A", "--output", "no/such/dir"], "--output"),
        ([], "required: B.json"),
    ],
)
def test_bad_words(words, message, files, capsys):
    words = [files["a"] if word == "A" else word for word in words]
    try:
        code = main(["bench", "compare", files["a"], *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
