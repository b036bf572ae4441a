"""The compiled decoder under AddressSanitizer with UBSan and under TSan, by a program of its own
(check_decoder.cpp): there is neither Python nor OpenMP, whose threads TSan does not know."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from helpers import shim_build

SOURCE = shim_build.ROOT / "tests" / "native" / "check_decoder.cpp"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("decoder-sanitizers"),
    pytest.mark.skipif(shutil.which(shim_build.COMPILER) is None, reason="no C++ compiler"),
]


def run(variant, cpu_dir=shim_build.CPU):
    if not shim_build.runtime_libraries(variant):
        pytest.skip(f"the compiler has no {variant}")
    program = shim_build.build_cpu_program(SOURCE, variant, cpu_dir)
    env = os.environ | shim_build.SANITIZER_OPTIONS
    return subprocess.run([program], capture_output=True, text=True, env=env, timeout=600)


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_forwards_are_clean_and_the_same_on_any_threads(variant):
    result = run(variant)
    print(result.stdout[-5000:], result.stderr[-10000:])
    assert result.returncode == 0
    assert "the same" in result.stdout
    assert "differs" not in result.stdout


def test_threads_that_do_not_wait_for_each_other_are_noticed(tmp_path):
    changed = tmp_path / "cpu"
    shutil.copytree(shim_build.CPU, changed)
    stages = changed / "stages.h"
    text = stages.read_text()
    weaker = text.replace("memory_order_release", "memory_order_relaxed")
    stages.write_text(weaker.replace("memory_order_acquire", "memory_order_relaxed"))
    assert stages.read_text() != text
    result = run("tsan", changed)
    assert result.returncode != 0
    assert "data race" in result.stderr
