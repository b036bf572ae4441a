"""benchmarks/report.py on what a real run of the kernel benchmarks saved."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "benchmarks" / "report.py"


def run_report(*args):
    command = [sys.executable, str(REPORT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def rows_of(file):
    """Where the run that saved `file` put its rows as they came."""
    return file.with_suffix(".jsonl")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saved JSON of one benchmark with cold inputs and one without, and what the run printed."""
    file = tmp_path_factory.mktemp("benchmark") / "run.json"
    more = [f"--rows={rows_of(file)}", "--row-seconds=0.1"]
    benches = ["benchmarks/bench_build_tree.py", "benchmarks/bench_sample.py"]
    chosen = "cpu and ((build_tree and N5-) or (bench_sample and greedy and B1-V4096))"
    command = [sys.executable, "-m", "pytest", *benches, "-k", chosen, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *more, f"--benchmark-json={file}"],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        # Not as a worker of these tests: there are no benchmarks in such.
        env={k: v for k, v in os.environ.items() if "PYTEST_" not in k} | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return file, done.stdout


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(markdown):
    """{heading: rows of the tables under it, as lists of cells, titles first}."""
    found, heading = {}, ""
    for line in markdown.splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("|") and not line.startswith("| ---"):
            found.setdefault(heading, []).append(cells(line))
    return found


def test_a_run_prints_and_saves_what_the_columns_say(saved):
    file, printed = saved
    rows = {
        b["extra_info"]["op"]: b["extra_info"] for b in json.loads(file.read_text())["benchmarks"]
    }
    assert set(rows) == {"build_tree", "sample"}
    sample, tree = rows["sample"], rows["build_tree"]
    assert sample["bytes"] == 4096 * 2 + 8 + 4
    assert sample["gb_per_s"] == pytest.approx(sample["bytes"] / sample["time_us"] / 1e3)
    read = sample["bandwidth_gb_per_s"]["read"]
    assert sample["fraction_of_bandwidth"] == pytest.approx(sample["gb_per_s"] / read)
    assert sample["times_as_fast_as"].keys() == {"torch"}
    assert sample["fraction_of_plain"] > 0
    assert tree["bound"] is None
    assert tree["fraction_of_bandwidth"] is None
    for line in ("time us", "greedy B=1 V=4096 bf16", "B=1 N=5 binary", "x torch"):
        assert line in printed
    assert "FlashInfer" not in printed


def test_saved_runs_do_not_name_the_computer(saved):
    info = json.loads(saved[0].read_text())["machine_info"]
    assert "node" not in info
    assert str(saved[0].parent) not in saved[0].read_text()
    assert info["inferlab"]["command"].startswith("pytest benchmarks/bench_build_tree.py")


def test_report_has_a_table_per_op_under_where_it_is_from(saved):
    done = run_report(saved[0])
    assert done.returncode == 0, done.stderr
    found = tables(done.stdout)
    titles, row = found["sample"]
    row = dict(zip(titles, row, strict=True))
    assert row["case"] == "greedy B=1 V=4096 bf16"
    assert row["must move"] == "8.20 kB"
    assert re.fullmatch(r"[\d.,]+", row["time us"])
    assert re.fullmatch(r"\d+\.\d\d read", row["of b/w"])
    (_, tree) = found["build_tree"]
    assert tree[0] == "B=1 N=5 binary"
    assert "of b/w" not in found["build_tree"][0], "a column without a cell"
    top = done.stdout.split("## What must hold")[0]
    assert "pytest benchmarks/bench_build_tree.py" in top
    for word in ("inferlab", "torch", "python", "copy", "read", "threads"):
        assert word in top


def test_rows_saved_as_they_came_make_the_same_tables(saved):
    whole, by_row = (tables(run_report(f).stdout) for f in (saved[0], rows_of(saved[0])))
    assert by_row == whole
    assert "read" in run_report(rows_of(saved[0])).stdout.split("## What must hold")[0]


def test_a_run_that_was_killed_keeps_its_rows(saved, tmp_path):
    lines = rows_of(saved[0]).read_text().splitlines(keepends=True)
    assert [sorted(json.loads(line)) for line in lines] == [
        ["datetime", "machine_info"],
        ["extra_info", "name"],
        ["extra_info", "name"],
    ]
    file = tmp_path / "killed.jsonl"
    file.write_text("".join(lines[:2]) + lines[2][:40])
    done = run_report(file)
    assert done.returncode == 0, done.stderr
    assert "build_tree" in tables(done.stdout)
    assert "sample" not in tables(done.stdout)
    file.write_text(lines[0] + lines[1][:40] + "\n" + lines[2])
    done = run_report(file)
    assert done.returncode == 2
    assert f"{file}, line 2 is not JSON" in done.stderr
    file.write_text(lines[1])
    assert "line 1 is not of a file written by --rows" in run_report(file).stderr


def test_the_summary_of_a_device_run(saved, tmp_path):
    (tmp_path / "kernels.jsonl").write_text(rows_of(saved[0]).read_text())
    row = {"what": "plain decoding", "value": 166.079, "unit": "tok/s", "step_ms": 6.021}
    (tmp_path / "decode.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="3" skipped="1"><testcase name="one"/><testcase name="two">'
        '<failure message="assert 1 == 2&#10;more">long</failure></testcase>'
        "</testsuite></testsuites>"
    )
    (tmp_path / "status.txt").write_text("smoke 5 s ok\n")
    summary = ROOT / "benchmarks" / "device" / "summary.py"
    done = subprocess.run(
        [sys.executable, str(summary), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "greedy B=1 V=4096 bf16" in done.stdout
    assert re.search(r"plain decoding +166\.079 tok/s +step_ms 6\.021", done.stdout)
    assert "tests: 1 passed, 1 failed, 1 skipped" in done.stdout
    assert "failure: two: assert 1 == 2\n" in done.stdout
    assert done.stdout.rstrip().endswith("smoke 5 s ok")
    (tmp_path / "tests.xml").write_text("<testsuites")
    done = subprocess.run(
        [sys.executable, str(summary), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert "tests.xml cannot be read" in done.stdout
    assert "smoke 5 s ok" in done.stdout


def test_unmeasured_promises_say_so_and_nothing_else(saved):
    promises = tables(run_report(saved[0]).stdout)["What must hold"][1:]
    on_cuda = [row for row in promises if row[0] == "cuda"]
    assert len(on_cuda) >= 5
    assert all(row[3:] == ["not measured", "", ""] for row in on_cuda)


def with_rows(run, *rows):
    """The run, with kernel rows made from its sample row."""
    made = copy.deepcopy(run)
    (pattern,) = [b for b in run["benchmarks"] if b["extra_info"]["op"] == "sample"]
    made["benchmarks"] = []
    for row in rows:
        bench = copy.deepcopy(pattern)
        bench["extra_info"].update(row)
        made["benchmarks"].append(bench)
    return made


def verify_row(time_us, **changes):
    shape = {"B": 1, "N": 64, "tree": "binary", "V": 151_936, "dtype": "bf16"}
    row = {"op": "verify_tree_match", "variant": "greedy", "device": "cuda", "bound": "copy"}
    return {**row, "shape": shape, "time_us": time_us, "timed_by": "graph", **changes}


def attention_row(fraction, nodes, kv_heads=8, **changes):
    heads = {"Hq": 32, "Hkv": kv_heads, "D": 128}
    shape = {"B": 32, "N": nodes, "tree": "chain", **heads, "L": 4096, "dtype": "bf16"}
    row = {"op": "paged_tree_attention", "variant": "decode", "device": "cuda", "bound": "copy"}
    return {**row, "shape": shape, "fraction_of_bandwidth": fraction, **changes}


def test_promises_are_judged_by_their_worst_row_of_several_files(saved, tmp_path):
    run = json.loads(saved[0].read_text())
    run["machine_info"]["inferlab"]["gpus"] = ["A GPU"]
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    rivals = {"torch": 3.0, "FlashInfer": 1.25}
    first.write_text(
        json.dumps(
            with_rows(
                run,
                verify_row(30.0),
                verify_row(99.0, variant="plain"),  # no promise is about it
                attention_row(0.91, 1, times_as_fast_as=rivals),
                attention_row(0.84, 16),
                attention_row(0.10, 32),  # more nodes than is promised
                attention_row(0.10, 1, kv_heads=4),  # fewer KV heads
            )
        )
    )
    second.write_text(json.dumps(with_rows(run, verify_row(8.5))))
    done = run_report(first, second)
    assert done.returncode == 0, done.stderr
    found = tables(done.stdout)
    promises = {(row[0], row[1]): row[2:] for row in found["What must hold"][1:]}

    def promise(*words):
        (row,) = [
            v for k, v in promises.items() if k[0] == "cuda" and all(w in k[1] for w in words)
        ]
        return row

    # The later file's row replaces the earlier one of the same shape.
    assert promise("greedy verify")[:3] == ["at most 10 us", "8.50 us", "holds"]
    limit, worst, verdict, where = promise("attention", "copy bandwidth")
    assert (limit, worst, verdict) == ("at least 80 %", "84.0 %", "holds")
    assert "N=16" in where
    assert promise("FlashInfer")[1:3] == ["1.25 x", "holds"]
    assert promise("compaction")[1] == "not measured"
    titles, *rows = found["paged_tree_attention"]
    by_case = {row[0]: dict(zip(titles, row, strict=True)) for row in rows}
    assert by_case["decode B=32 N=1 chain Hq=32 Hkv=8 D=128 L=4096 bf16"]["x FlashInfer"] == "1.2"

    second.write_text(json.dumps(with_rows(run, verify_row(12.5))))
    found = tables(run_report(first, second).stdout)["What must hold"]
    (greedy,) = [row for row in found if row[0] == "cuda" and "greedy verify" in row[1]]
    assert greedy[3:5] == ["12.5 us", "does not hold"]


def test_benchmarks_without_bytes_are_listed_too(saved, tmp_path):
    run = json.loads(saved[0].read_text())
    run["benchmarks"][0]["extra_info"] = {"tensors": 7, "overhead_us": 1.25}
    run["benchmarks"][0]["name"] = "bench_overhead"
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run))
    (row,) = tables(run_report(file).stdout)["Others"][1:]
    assert row[0] == "bench_overhead"
    assert row[2] == "tensors 7, overhead_us 1.25"


def test_plots_and_output_file(saved, tmp_path):
    pytest.importorskip("matplotlib")
    output, plots = tmp_path / "report.md", tmp_path / "plots"
    done = run_report(saved[0], "--output", output, "--plots", plots, "--format", "png")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert output.read_text().startswith("# Kernel benchmarks")
    # Only ops that memory bounds have a bandwidth to plot.
    assert [file.name for file in plots.iterdir()] == ["sample.png"]
    assert (plots / "sample.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["no json", "[]", '{"benchmarks": []}'])
def test_a_file_of_something_else_is_refused_by_name(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    done = run_report(file)
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr
