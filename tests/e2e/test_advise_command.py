"""`inferlab advise` on the bundled pair, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_it_advises_on_the_bundled_pair(tmp_path):
    words = "--draft-mode vanilla,eagle --heldout 2 --max-tokens 12 --batch 1,2 --verify"
    done = subprocess.run(
        [sys.executable, "-m", "inferlab", "advise", *words.split(), "--iterations", "1",
         "--json", "advice.json", "--plot", "curve.svg"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "batch 2: " in done.stdout
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    value = json.loads((tmp_path / "advice.json").read_text())
    for size in ("1", "2"):
        best = value["best"][size]
        assert {row["draft_mode"] for row in best} == {"vanilla", "eagle"}
        assert all(row["length"] > 1 and row["speedup"] > 0 for row in best)
        assert not best[0]["rough"]
        assert value["verified"][size]["speedup"] > 0
