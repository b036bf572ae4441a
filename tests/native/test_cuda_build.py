"""The CUDA side as far as a machine without a GPU can tell: build options, linkage, no driver."""

import os
import re
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


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    return run(
        "cmake",
        *("-S", str(ROOT), "-B", str(build)),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DSKBUILD_PROJECT_VERSION=0",
        *options,
        **NO_NVCC,
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


@needs_cmake
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("strict", ["ON", "OFF"])
def test_spills_and_local_memory_are_errors_where_asked_for(tmp_path, strict):
    """A kernel that indexes an array at run time keeps it in local memory."""
    source = tmp_path / "source"
    for folder in ("cmake", "csrc/cuda", "csrc/include"):
        shutil.copytree(ROOT / folder, source / folder)
    for kernel in (source / "csrc" / "cuda").glob("*.cu"):
        kernel.unlink()
    (source / "csrc" / "cuda" / "local.cu").write_text(
        "__global__ void local(int* p) {\n"
        "  int a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[p[i] & 63] = i;\n"
        "  *p = a[*p & 63];\n"
        "}\n"
    )
    (source / "module.cpp").touch()
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        "project(local LANGUAGES CXX)\n"
        "include(cmake/Options.cmake)\n"
        "add_library(_C OBJECT module.cpp)\n"
        "include(cmake/Cuda.cmake)\n"
    )
    options = ["-DINFERLAB_CUDA_ARCHITECTURES=90", f"-DINFERLAB_CUDA_WERROR={strict}"]
    build = ["cmake", "--build", str(tmp_path / "build"), "--target", "inferlab_cuda"]
    configured = run("cmake", "-S", str(source), "-B", str(tmp_path / "build"), *options)
    assert configured.returncode == 0, configured.stderr
    result = run(*build)
    if strict == "OFF":
        assert result.returncode == 0, result.stdout + result.stderr
    else:
        assert result.returncode != 0
        assert "Local memory used" in result.stdout + result.stderr


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


def test_kernels_that_begin_early_wait_before_they_touch_memory():
    """Those launched with Start::kEarly call wait_for_earlier_kernels, the others need not."""
    early = set()
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        source = path.read_text()
        if "Start::kEarly" not in source:
            assert "wait_for_earlier_kernels" not in source, path
            continue
        early.add(path.name)
        kernels = re.findall(r"__global__.*?\n}\n", source, re.S)
        assert kernels, path
        for kernel in kernels:
            assert "wait_for_earlier_kernels();" in kernel, kernel[:200]
            assert "return" not in kernel.split("wait_for_earlier_kernels();")[0], kernel[:200]
    assert "linear.cu" in early
