"""csrc/cpu in programs of its own: there is neither Python nor OpenMP, whose threads TSan does not
know. Under AddressSanitizer with UBSan and under TSan, and, where there are a compiler for it and
qemu, on another processor (Debian: g++-aarch64-linux-gnu, qemu-user).
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from helpers import shim_build

DECODER, PACKED = (
    shim_build.ROOT / "tests" / "native" / f"check_{name}.cpp" for name in ("decoder", "packed")
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("cpu-programs"),
    pytest.mark.skipif(shutil.which(shim_build.COMPILER) is None, reason="no C++ compiler"),
]


def run(command):
    env = os.environ | shim_build.SANITIZER_OPTIONS
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    print(result.stdout[-5000:], result.stderr[-10000:])
    return result


def build(source, variant, cpu_dir=shim_build.CPU):
    if not shim_build.runtime_libraries(variant):
        pytest.skip(f"the compiler has no {variant}")
    return shim_build.build_cpu_program(source, variant, cpu_dir)


def check(result):
    assert result.returncode == 0
    assert "the same" in result.stdout
    assert "differs" not in result.stdout


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_forwards_are_clean_and_the_same_on_any_threads(variant):
    check(run([build(DECODER, variant)]))


def test_products_with_packed_weights_are_what_plain_loops_give():
    check(run([build(PACKED, "asan")]))


def test_threads_that_do_not_wait_for_each_other_are_noticed(tmp_path):
    changed = tmp_path / "cpu"
    shutil.copytree(shim_build.CPU, changed)
    stages = changed / "stages.h"
    text = stages.read_text()
    weaker = text.replace("memory_order_release", "memory_order_relaxed")
    stages.write_text(weaker.replace("memory_order_acquire", "memory_order_relaxed"))
    assert stages.read_text() != text
    result = run([build(DECODER, "tsan", changed)])
    assert result.returncode != 0
    assert "data race" in result.stderr


@pytest.mark.parametrize(
    "processor",
    ["max", "cortex-a72"],  # with products of four bytes and without
)
@pytest.mark.parametrize("source", [DECODER, PACKED], ids=lambda source: source.stem)
def test_arm_does_the_same(source, processor):
    machine = "aarch64"
    needed = (shim_build.cross_compiler(machine), f"qemu-{machine}")
    if missing := [name for name in needed if shutil.which(name) is None]:
        pytest.skip(f"no {missing[0]}")
    program = shim_build.build_cpu_program(source, "plain", machine=machine)
    check(run([needed[1], "-cpu", processor, program]))
