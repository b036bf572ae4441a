"""`inferlab bench --quantization-matrix`: every format of target and draft."""

from __future__ import annotations

import json

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.tiny_models import tiny_tokenizer
from inferlab.benchmarks.names import FORWARD_ROWS
from inferlab.benchmarks.quantization import FORMATS, QuantizationMatrix, weights_mb
from inferlab.benchmarks.quantization_report import matrix_report
from inferlab.cli import main
from inferlab.config import SpecdecConfig
from inferlab.models import HFModel
from inferlab.reports.terminal import print_report

QUICK = ["bench", "--quantization-matrix", "--max-tokens", "8", "--iterations", "1", "--warmup",
         "0", "--no-progress", "--log-level", "ERROR"]  # fmt: skip


def test_every_format_of_target_and_draft_is_measured(tmp_path, capsys):
    prefix = tmp_path / "matrix"
    prompts = ["--prompt", "def add(a, b):\n    return a +"]
    assert main([*QUICK, *prompts, "--dtype", "bfloat16", "--output", str(prefix)]) == 0
    shown = capsys.readouterr().out
    assert "differs after" in shown
    stats = json.loads((tmp_path / "matrix.json").read_text())
    assert (tmp_path / "matrix.png").stat().st_size > 1000
    assert list(FORMATS) == ["none", "int8", "int4"]
    assert list(stats["targets"]) == [*FORMATS, "none, int8 K/V", "none, fp8 K/V"]
    assert [(p["target"], p["draft"]) for p in stats["pairs"]] == [
        (target, draft) for target in FORMATS for draft in FORMATS
    ]
    none, int8, int4, *kept = stats["targets"].values()
    assert none["weights_mb"] > int8["weights_mb"] > int4["weights_mb"] > 0
    for of, bytes_per_head, rel in zip(kept, (36, 32), (0.02, 0.05), strict=True):
        assert of["weights_mb"] == none["weights_mb"]
        assert of["kv_bytes_per_token"] * 64 == none["kv_bytes_per_token"] * bytes_per_head
        assert of["perplexity"] == pytest.approx(none["perplexity"], rel=rel)
        assert of["perplexity"] != none["perplexity"]
    assert none["x_unquantized"] is None
    assert none["same_tokens"] == none["compared"] == 1
    assert none["first_difference"] is None
    assert none["perplexity"] == pytest.approx(int8["perplexity"], rel=0.02)
    assert none["perplexity"] == pytest.approx(int4["perplexity"], rel=0.2)
    assert all(set(of["forward_ms"]) == set(map(str, FORWARD_ROWS)) for of in (none, int8, int4))
    assert all(pair["accepted_length"] >= 1 for pair in stats["pairs"])
    assert stats["settings"]["controller"] == "fixed"
    assert not stats["failures"]
    print_report(matrix_report(stats))
    assert capsys.readouterr().out == shown


def test_a_drafter_without_a_model_has_no_formats():
    config = SpecdecConfig(
        draft_mode="ngram", max_draft=2, max_new_tokens=6, iterations=1, warmup_iterations=0
    )
    matrix = QuantizationMatrix(config)
    calls = []
    stats = matrix.run(["a b a b a b"], calls.append)
    assert sum(calls) == matrix.num_runs(1) == 8
    assert [(p["target"], p["draft"], p["draft_mb"]) for p in stats["pairs"]] == [
        (target, "none", None) for target in FORMATS
    ]


def test_what_has_no_meaning_is_refused(capsys):
    for flags, message in (
        (["--quantization", "int8"], "--quantization: has no meaning with --quantization-matrix"),
        (["--modes", "all"], "--modes: has no meaning"),
        (["--impl", "fake"], "needs models with weights"),
        (["--prompt", ""], "prompt"),
    ):
        assert main([*QUICK, *flags]) == 2
        assert message in capsys.readouterr().err


def test_prompts_of_one_token_have_no_perplexity_and_short_contexts_no_long_forwards(tmp_path):
    config = GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=2, n_positions=80)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = {"draft_mode": "ngram", "max_draft": 2, "iterations": 1, "warmup_iterations": 0}
    matrix = QuantizationMatrix(
        SpecdecConfig(base_model=str(tmp_path), max_new_tokens=4, **settings)
    )
    rows = []
    stats = matrix.run(["a"], keep=rows.append)
    assert len(rows) == 8
    assert [of["perplexity"] for of in stats["targets"].values()] == [None] * 5
    assert all(list(of["forward_ms"]) == ["1", "8"] for of in stats["targets"].values())
    print_report(matrix_report(stats))


def test_prompts_that_a_format_did_not_decode_are_not_compared():
    config = SpecdecConfig(
        draft_mode="ngram", max_draft=2, max_new_tokens=4, iterations=1, warmup_iterations=0
    )
    matrix = QuantizationMatrix(config)
    runs = []

    def interrupt(count: int) -> None:
        runs.append(count)
        if len(runs) == 3:
            raise KeyboardInterrupt

    stats = matrix.run(["a b a b", "c d c d", "e f e f"], interrupt)
    assert stats["interrupted"]
    assert {of["compared"] for of in stats["targets"].values()} == {1}
    assert all(of["same_tokens"] <= 1 for of in stats["targets"].values())


def test_shared_weights_are_counted_once():
    model = HFModel.load("inferlab/tiny", dtype="float32")
    assert weights_mb(model) == pytest.approx(4 * model.num_parameters / 2**20, rel=0.01)
