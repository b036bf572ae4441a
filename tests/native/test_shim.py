"""The shim that stands for a GPU, itself: right kernels pass on it, and each kind of mistake is
reported as what it is (tests/native/kernels/shim_cases.cu)."""

import os
import re
import subprocess
from functools import cache

import pytest

from helpers import shim_build, shim_run

SOURCE = shim_build.ROOT / "tests" / "native" / "kernels" / "shim_cases.cu"
RACE = "WARNING: ThreadSanitizer: data race"
OK = "ok$"

# Case -> what the program says, by variant where they differ.
CASES = {
    "sums": OK,
    "sums/no barrier after write": {"tsan": RACE, "": "wrong: "},
    "sums/no barrier after read": {"tsan": RACE, "": "wrong: "},
    "predicates": OK,
    "early exit": OK,
    "divergent barrier": r"failed: divergent barrier: .* shim_cases\.cu:\d+ and at shim_cases\.cu",
    "deadlock": r"failed: deadlock: thread \(0, 0, 0\) of block .* shim_cases\.cu:\d+, thread",
    "shuffles": OK,
    "votes": OK,
    "hand on": OK,
    "hand on/by shuffle": {"tsan": RACE, "": OK},
    "hand on/by nothing": {"tsan": RACE, "": "wrong: "},
    "divergent warp": "failed: divergent warp: lanes of mask 0xffffffff meet in different",
    "lane not in mask": r"failed: lane \d+ is not in its own mask, 0xffff",
    "lane exited": "failed: (lanes 0x80 of mask 0xffffffff have exited|deadlock: )",
    "lane never was": "failed: lanes 0xffffff[0-9a-f]{2} of mask 0xffffffff have exited or never",
    "atomics": OK,
    "last block": OK,
    "last block/fence of the block": {"tsan": RACE, "": OK},
    "last block/no fence": {"tsan": RACE, "": OK},
    "last block/writer's fence": {"tsan": RACE, "": OK},
    "last block/reader's fence": {"tsan": RACE, "": OK},
    "relay": OK,
    "relay/no fence": {"tsan": RACE, "": OK},
    "relay/not together": r"failed: livelock: threads poll .* waits at shim_cases\.cu:\d+",
    "launches are ordered": OK,
    "orders change": OK,
    "whole grid": OK,
    "many blocks": OK,
    "shared": OK,
    "shared/overrun": {"asan": "heap-buffer-overflow", "": "failed: a block wrote past the end"},
    "global": OK,
    "global/overrun": {"asan": "heap-buffer-overflow", "": OK},
    "poison": OK,
    "aligned": OK,
    "aligned/not": {"asan": "misaligned address", "": OK},
    "overflow/not": OK,
    "overflow": {"asan": "signed integer overflow", "": OK},
    "stack": OK,
    "stack/overflow": {"asan": "stack-overflow", "tsan": "DEADLYSIGNAL", "": "^$"},
    "launch/threads": "failed: illegal launch: blocks of 1025 threads",
    "launch/shared memory": "failed: illegal launch: 102400 bytes of shared memory",
    "launch/together": "failed: illegal launch: 7 blocks together",
}
UNDEFINED = ("aligned/not", "overflow")  # anything may come of these: only UBSan's word counts
PAIRS = [(v, c) for v in shim_build.VARIANTS for c in CASES if c not in UNDEFINED or v == "asan"]


@cache
def program(variant):
    shim_run.need_compiler(variant)
    return shim_build.build_program(SOURCE, variant)


@pytest.mark.parametrize(("variant", "case"), PAIRS, ids=lambda value: value.replace(" ", "-"))
def test_shim_tells_right_from_wrong(variant, case):
    expected = CASES[case]
    if isinstance(expected, dict):
        expected = expected.get(variant, expected[""])
    result = subprocess.run(
        [program(variant), case],
        env={**os.environ, **shim_build.SANITIZER_OPTIONS},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
    )
    words = result.stdout + result.stderr
    assert re.search(expected, words.strip(), re.MULTILINE), words
    says_so = expected == OK or expected.startswith(("failed: ", "wrong: "))
    assert (result.returncode == 0) == says_so, words
