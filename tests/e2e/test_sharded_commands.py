"""Commands on two ranks, started by the command itself and by torchrun; their ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

WORDS = (
    "specdec",
    "--draft-mode",
    "eagle",
    "--controller",
    "fixed",
    "--max-tokens",
    "12",
    "--prompt",
    "import os\n",
)


def run(*words: str, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if torchrun:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.run(
        [*start, "-m", "inferlab", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture(scope="module")
def alone() -> dict:
    return json.loads(run(*WORDS, "--json").stdout)


@pytest.mark.parametrize("torchrun", [False, True])
def test_one_answer_comes_out_of_two_ranks(alone, torchrun):
    words = (*WORDS, "--json", *(() if torchrun else ("--tensor-parallel", "2")))
    done = run(*words, torchrun=torchrun)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)  # one, of one of the ranks
    assert answer["token_ids"] == alone["token_ids"]
    assert answer["accepted"] > 0
    assert "shared out over 2 ranks" in done.stderr


def test_hugging_face_generates_on_the_same_ranks():
    words = ("bench", "--mode", "specdec", "--compare-baseline", "--iterations", "1")
    words += ("--warmup", "0", "--max-tokens", "6", "--prompt", "import os\n", "--no-progress")
    done = run(*words, "--draft-mode", "ngram", "--tensor-parallel", "2")
    assert done.returncode == 0, done.stderr
    assert "Hugging Face generate" in done.stdout
    assert "token ids: identical for 1 prompts" in done.stdout


def test_a_model_that_cannot_be_shared_out_is_one_line():
    done = run(*WORDS, "--tensor-parallel", "2", "--base-model", "/no/such/model")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "/no/such/model" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
