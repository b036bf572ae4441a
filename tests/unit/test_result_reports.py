"""Reports of real runs: every figure follows from the raw rows in the JSON, which adds up."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from inferlab.benchmarks import result_files
from inferlab.benchmarks.result_files import report_of
from inferlab.benchmarks.samples import samples_of
from inferlab.cli import main
from inferlab.records import record_of, total_stats
from inferlab.reports.model import Bars, Table

FEW = ["--max-tokens", "16", "--iterations", "2", "--warmup", "0"]
PROMPTS = ["def add(a, b):", "class Stack:", "a b a b a b a"]
PHASES = ["prefill", "draft", "verify", "accept", "commit", "rest"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return str(file)


def measured(folder, *words):
    assert main(["bench", *FEW, *words, "--output", str(folder / "r")]) == 0
    return json.loads((folder / "r.json").read_text())


@pytest.fixture(scope="module")
def compared(tmp_path_factory, prompts):
    """The bundled pair, plain decoding and Hugging Face's, in turns."""
    words = ["--mode", "specdec", "--compare-baseline", "--prompts", prompts, "--controller"]
    return measured(tmp_path_factory.mktemp("r"), *words, "fixed")


@pytest.fixture(scope="module")
def modes(tmp_path_factory, prompts):
    words = ["--modes", "ngram,vanilla", "--batch", "1,2", "--prompts", prompts]
    return measured(tmp_path_factory.mktemp("r"), *words, "--controller", "fixed")


def four(value):
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def tables(stats):
    return [part for part in report_of(stats).parts if isinstance(part, Table)]


def test_the_summary_follows_from_the_rows(compared):
    table, beside, by_prompt = tables(compared)
    rows = [row for row in compared["runs"] if row["mode"] == "specdec"]
    assert len(rows) == 6
    keys = {"latency, ms": "latency_ms", "tokens per second": "tokens_per_second",
            "ms per token": "ms_per_token", "first token, ms": "first_token_ms",
            "acceptance rate": "acceptance_rate", "accepted length": "mean_accepted_length",
            "target forwards": "target_forwards", "new tokens": "num_tokens"}  # fmt: skip
    assert {row[0] for row in table.rows} == set(keys)
    for title, mean, median, std, least, most, p90, p99, _ in table.rows:
        values = np.array([row[keys[title]] for row in rows], dtype=float)
        wanted = [values.mean(), np.median(values), values.std(ddof=1), values.min(),
                  values.max(), *np.percentile(values, [90, 99])]  # fmt: skip
        assert [mean, median, std, least, most, p90, p99] == [four(v) for v in wanted]
    for mode, name in (("speculative", "specdec"), ("plain, same engine", "plain")):
        (cells,) = (row for row in beside.rows if row[0] == mode)
        own = [row for row in compared["runs"] if row["mode"] == name]
        assert cells[1] == four(np.median([row["tokens_per_second"] for row in own]))
    for index, cells in enumerate(by_prompt.rows):
        own = [row for row in rows if row["prompt_index"] == index]
        assert cells[2] == four(np.median([row["latency_ms"] for row in own]))
        assert cells[5] == PROMPTS[index]


def test_rows_follow_from_records(compared):
    """And so do token ids, whose verdict is printed: they are there for every mode."""
    for sample in samples_of(compared):
        (record,) = sample.records
        assert sample.figures["latency_ms"] == record.latency_ms
        assert sample.figures["num_tokens"] == record.num_tokens == len(record.token_ids)
        if record.speculation is not None:
            stats = record.speculation.stats
            assert sample.figures["acceptance_rate"] == stats.acceptance_rate
    ids = {}
    for sample in samples_of(compared):
        ids.setdefault(sample.prompts, set()).add(tuple(sample.records[0].token_ids))
    same = all(len(found) == 1 for found in ids.values())
    assert same == compared["baseline_comparison"]["token_ids"]["identical"]


def test_throughput_times_time_is_tokens(compared, modes):
    for row in (*compared["runs"], *modes["runs"]):
        assert row["tokens_per_second"] * row["latency_ms"] / 1e3 == pytest.approx(
            row["num_tokens"]
        )
        if row["num_tokens"]:
            assert row["ms_per_token"] * row["num_tokens"] == pytest.approx(row["latency_ms"])
    for row in modes["runs"]:
        assert sum(r["num_tokens"] for r in row["records"]) == row["num_tokens"]


def test_phases_add_up_to_the_total(compared, modes):
    """Within 2 %, in every run and in the means over them."""
    for result in compared["raw_results"]:
        assert list(result["timings_ms"]) == PHASES
        assert sum(result["timings_ms"].values()) == pytest.approx(result["latency_ms"], rel=0.02)
    for row in modes["runs"]:
        if row["timings_ms"]:
            assert sum(row["timings_ms"].values()) == pytest.approx(row["latency_ms"], rel=0.02)
    for stats in (compared, compared["baseline_comparison"]["modes"]["plain"]):
        per_token = np.sum(stats["latency_ms"]["raw"]) / np.sum(stats["num_tokens"]["raw"])
        assert sum(stats["phases_ms_per_token"].values()) == pytest.approx(per_token, rel=0.02)
    (bars,) = (part for part in report_of(compared).parts if isinstance(part, Bars))
    assert list(bars.labels) == ["specdec", "plain"]
    assert {name: of[0] for name, of in bars.parts.items()} == compared["phases_ms_per_token"]


def test_the_table_of_modes_follows_from_the_rows(modes):
    report = report_of(modes)
    found = [part for part in report.parts if isinstance(part, Table)]
    assert len(found) == 2
    for size, table in zip((1, 2), found, strict=True):
        for name, length, positions, _, _, speed, *_ in table.rows:
            titles = {"HF generate": "hf", "HF assistant_model": "hf-assistant",
                      "HF prompt_lookup": "hf-lookup"}  # fmt: skip
            mode = titles.get(name, name)
            rows = [r for r in modes["runs"] if (r["batch_size"], r["mode"]) == (size, mode)]
            assert len(rows) == (6 if size == 1 else 4)
            assert speed == f"{np.median([r['tokens_per_second'] for r in rows]):.0f}"
            stats = total_stats(record_of({"record": r}) for row in rows for r in row["records"])
            assert length == (f"{stats.mean_accepted_length:.2f}" if stats.steps else "")
            assert len(positions.split()) == min(4, len(stats.offered_at))


def test_plots_hold_every_run(compared, modes):
    plots = {plot.title: plot for plot in report_of(compared).plots}
    assert list(plots) == ["latency, ms", "first token, ms", "ms per token",
                           "Acceptance by position", "Time by phase"]  # fmt: skip
    series = {one.name: one.points for one in plots["latency, ms"].series}
    assert list(series) == ["specdec", "plain", "hf"]
    for mode, points in series.items():
        values = sorted(r["latency_ms"] for r in compared["runs"] if r["mode"] == mode)
        assert [x for x, _ in points[1:]] == values
    (accepted,) = plots["Acceptance by position"].series
    records = [record_of(result) for result in compared["raw_results"]]
    assert [y for _, y in accepted.points] == total_stats(records).acceptance_by_position
    curve = report_of(modes).plots[0]
    assert curve.title == "Latency against throughput"
    assert {one.name: len(one.points) for one in curve.series} == {
        mode: 2 for mode in ("ngram", "vanilla", "plain")
    }


@pytest.mark.parametrize("name", ["compared", "modes"])
def test_each_table_and_plot_names_where_its_rows_are(name, request):
    stats = request.getfixturevalue(name)
    parts = [*report_of(stats).tables, *report_of(stats).plots]
    assert len(parts) > 6
    for part in parts:
        keys = re.match(r"(\w+)(?:\[\])?(?:\.(\w+))?", part.source)
        assert keys is not None, part
        rows = stats[keys[1]]
        assert isinstance(rows, list)
        assert keys[2] is None or any(keys[2] in row for row in rows), part.source


@pytest.mark.parametrize("name", ["compared", "modes"])
def test_the_report_of_the_file_is_that_of_the_run(name, request, tmp_path, capsys):
    stats = request.getfixturevalue(name)
    file = tmp_path / "r.json"
    file.write_text(json.dumps(stats))
    assert main(["bench", "report", str(file), "--output", str(tmp_path / "again")]) == 0
    out = capsys.readouterr().out
    assert "base model: inferlab/tiny" in out
    assert all(cell in out for row in tables(stats)[0].rows for cell in row)
    assert (tmp_path / "again.html").read_text().startswith("<!DOCTYPE html>")
    assert "| " in (tmp_path / "again.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "is no result of `inferlab bench`"),
        ('{"a": 1}', "is no result of `inferlab bench`"),
        ('{"batches": {}}', "has no `runs`"),
        ('{"batches": {}, "runs": [NaN]}', "is not JSON: NaN is no number of JSON"),
        ('{"engines": {}, "runs": [5]}', "environment: Field required"),
        ('{"loads": []}', "mode: Field required"),
        (
            '{"mode": "http", "of": "rate", "stop_below_gain": 0.1, "stopped": "levels", '
            '"interrupted": false, "levels": [], "loads": []}',
            "loads: is empty",
        ),
        ('{"records": [5]}', "requests: Field required"),
    ],
)
def test_files_that_are_no_results(text, message, tmp_path, capsys):
    file = tmp_path / "r.json"
    if text is not None:
        file.write_text(text)
    for words in (["report", str(file)], ["compare", str(file), str(file)]):
        assert main(["bench", *words]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert "r.json" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"failures": None}, "failures: "),
        ({"runs": [{"latency_ms": "soon"}]}, "runs.0."),
        ({"runs": []}, "runs: is empty"),
    ],
)
def test_results_that_others_wrote_into_are_named(compared, change, message, tmp_path, capsys):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({**compared, **change}))
    for words in (["report", str(file)], ["compare", str(file), str(file)]):
        assert main(["bench", *words]) == 2
        assert f"r.json: {message}" in capsys.readouterr().err


def test_csv_of_batches_has_a_row_per_run(tmp_path, prompts):
    fake = ["--impl", "fake", "--modes", "ngram", "--batch", "2", "--prompts", prompts]
    stats = measured(tmp_path, *fake)
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(stats["runs"]) == 8
    assert {row["batch_size"] for row in rows} == {"2"}
    assert [float(r["latency_ms"]) for r in rows] == [r["latency_ms"] for r in stats["runs"]]


def test_without_matplotlib_the_html_has_the_plots(tmp_path, monkeypatch, caplog):
    def missing(plots, path):
        raise ValueError("matplotlib is missing; pip install matplotlib")

    monkeypatch.setattr(result_files, "draw_plots", missing)
    words = ["--prompt", "a b", "--dtype", "bfloat16"]
    measured(tmp_path, "--quantization-matrix", *words)
    assert not (tmp_path / "r.png").exists()
    assert "Forward time" in (tmp_path / "r.html").read_text()
    assert "r.png is left out: matplotlib is missing" in caplog.text


def test_failed_runs_are_told_in_every_form(tmp_path, capsys):
    words = ["--mode", "specdec", "--impl", "fake", "--prompt", "<b>x</b>", "--max-tokens", "5000"]
    assert main(["bench", *words, "--iterations", "1", "--output", str(tmp_path / "r")]) == 1
    assert "error: all 1 runs failed" in capsys.readouterr().out
    assert "&lt;b&gt;x&lt;/b&gt;" in (tmp_path / "r.html").read_text()
    assert "all 1 runs failed" in (tmp_path / "r.md").read_text()
