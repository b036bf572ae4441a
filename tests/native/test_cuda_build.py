"""The CUDA side as far as a machine without a GPU can tell: build options, linkage, no driver."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inferlab import _C

ROOT = Path(__file__).parents[2]
NO_NVCC = {"CUDACXX": "/nonexistent/nvcc"}

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    return subprocess.run(
        [
            "cmake",
            *("-S", str(ROOT), "-B", str(build)),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DSKBUILD_PROJECT_VERSION=0",
            *options,
        ],
        env={**os.environ, **NO_NVCC},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_cmake
def test_on_without_nvcc_says_what_to_do(tmp_path):
    result = configure(tmp_path, "-DINFERLAB_CUDA=ON")
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert "INFERLAB_CUDA=ON, but no nvcc was found" in message
    assert "set CUDACXX" in message


@needs_cmake
def test_auto_without_nvcc_builds_for_the_cpu(tmp_path):
    result = configure(tmp_path, "-DINFERLAB_CUDA=AUTO")
    assert result.returncode == 0, result.stderr
    assert "CUDA kernels OFF" in result.stdout


@needs_cmake
def test_a_wrong_value_is_named(tmp_path):
    result = configure(tmp_path, "-DINFERLAB_CUDA=YES")
    assert result.returncode != 0
    assert "INFERLAB_CUDA is 'YES'" in " ".join(result.stderr.split())


def test_devices_are_counted_without_a_driver():
    count = _C.cuda_device_count()
    if _C.build_info()["cuda"] is None:
        assert count == 0
    elif torch.cuda.is_available():
        assert count == torch.cuda.device_count()
    else:  # a torch without CUDA says nothing of the driver
        assert count >= 0


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_module_needs_no_cuda_library():
    dynamic = subprocess.run(
        ["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "libcudart" not in dynamic
    assert "libcuda." not in dynamic
