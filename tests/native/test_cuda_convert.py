"""csrc/cuda/convert.cuh, compiled against the shim, has the bits of dtype.h (check_convert.cpp)."""

import shutil
import subprocess

import pytest

from helpers import shim_build


@pytest.mark.skipif(shutil.which(shim_build.COMPILER) is None, reason="no C++ compiler")
def test_device_conversions_have_the_bits_of_the_hosts(tmp_path):
    program = tmp_path / "check_convert"
    csrc = shim_build.CSRC
    include = [f"-I{d}" for d in (shim_build.SHIM, csrc / "include", csrc / "cuda")]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fsanitize=undefined", *include]
    source = shim_build.ROOT / "tests" / "native" / "check_convert.cpp"
    subprocess.run([shim_build.COMPILER, *flags, source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
