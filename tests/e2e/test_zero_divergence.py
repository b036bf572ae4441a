"""benchmarks/zero_divergence.py: no token differs, and one that does is counted."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "zero_divergence.py"))


def test_no_text_differs_over_24_prompts(capsys):
    assert SCRIPT["main"](["--max-tokens", "24", "--temperature", "0.8", "--batch", "8"]) == 0
    rows = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("| none", "| int8"))
    ]
    assert len(rows) == 2 * 3 * 2
    assert all("| 24 | " in row for row in rows)


def test_prompts_of_a_file_are_cut_to_the_context(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "\n".join(json.dumps({"turns": [text]}) for text in ("import os\n" * 900, "a b"))
    )
    few = ["--max-tokens", "8", "--modes", "ngram", "--formats", "int4", "--batch", "2"]
    assert SCRIPT["main"](["--prompts", str(file), "--temperature", "0", *few]) == 0
    assert "0 texts differ" in capsys.readouterr().out


def test_a_text_that_differs_is_counted():
    results = [{"token_ids": [1, 2], "accepted": 1}, {"token_ids": [3], "accepted": 0}]
    pipeline = SimpleNamespace(generate=lambda group, **asked: results[: len(group)])
    wrong, accepted, _ = SCRIPT["differing"](pipeline, ["a", "b"], [[1, 2], [4]], 2, {})
    assert (wrong, accepted) == (1, 1)
