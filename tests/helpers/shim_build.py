"""Builds the compiled module with the CUDA sources compiled for the CPU (tests/native/shim).

The result is a `_C` whose ops run csrc/cuda on CPU tensors. The CPU kernels are not in it: nothing
calls them, and symbols are bound when they are first called. Objects are kept under build/shim by
the hash of what they were made from, so only what changed is compiled again.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SHIM = ROOT / "tests" / "native" / "shim"
CACHE = ROOT / "build" / "shim"
COMPILER = os.environ.get("CXX", "g++")

# What is instrumented: the kernels. The fibres tell the sanitizers themselves what they do.
SANITIZERS = {
    "plain": ([], []),
    "asan": (["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], ["-DSIMT_ASAN"]),
    "tsan": (["-fsanitize=thread"], ["-DSIMT_TSAN"]),
}
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
DEFINES = [
    "-DINFERLAB_WITH_CUDA=1",
    "-DINFERLAB_CUDA_SHIM=1",
    '-DINFERLAB_CUDA_VERSION="shim"',
    '-DINFERLAB_CUDA_ARCHS="shim"',
    '-DINFERLAB_VERSION="shim"',
    '-DINFERLAB_COMPILER="shim"',
]


def build(variant: str = "plain", cuda_dir: Path = CSRC / "cuda") -> Path:
    """The module's path. `cuda_dir` may be a changed copy of csrc/cuda.

    Raises:
        RuntimeError: something does not compile; holds the compiler's words.
    """
    import pybind11

    kernel_flags, runtime_flags = SANITIZERS[variant]
    include = [f"-I{SHIM}", f"-I{CSRC / 'include'}", f"-I{cuda_dir}", f"-I{CSRC / 'cpu'}"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    # -O1 -g: quick to compile, and the sanitizers' traces can be read.
    base = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    jobs: list[tuple[Path, list[str]]] = []
    for source in sorted((CSRC / "bindings").glob("*.cpp")):
        jobs.append((source, [*base, "-g0", *DEFINES, *include, *python]))
    for source in sorted(cuda_dir.glob("*.cu")):
        flags = [*base, *WARNINGS, *DEFINES, *kernel_flags, *include]
        jobs.append((source, ["-x", "c++", *flags]))
    jobs.append((SHIM / "simt.cpp", [*base, "-O2", *runtime_flags, *include]))
    headers = _digest(
        p for d in (CSRC, SHIM, cuda_dir) for p in d.rglob("*") if p.suffix in (".h", ".cuh")
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(*job, headers), jobs))
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    module = CACHE / f"{variant}-{key}" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        part = module.with_suffix(f".{os.getpid()}")
        _run([COMPILER, "-shared", "-Wl,-z,lazy", *kernel_flags, *map(str, objects), "-o", part])
        part.replace(module)
    return module


def load(path: Path) -> ModuleType:
    """The module at `path`, beside the installed `inferlab._C`."""
    loader = importlib.machinery.ExtensionFileLoader("inferlab_shim._C", str(path))
    spec = importlib.util.spec_from_file_location("inferlab_shim._C", path, loader=loader)
    assert spec is not None
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    finally:
        sys.setdlopenflags(flags)
    return module


def runtime_library(variant: str) -> str:
    """The sanitizer's library, which must be loaded before Python itself (LD_PRELOAD)."""
    name = {"asan": "libasan.so", "tsan": "libtsan.so"}[variant]
    found = _run([COMPILER, f"-print-file-name={name}"]).strip()
    return str(Path(found).resolve())


def _compile(source: Path, flags: list[str], headers: str) -> Path:
    key = hashlib.sha256(" ".join([COMPILER, *flags, headers]).encode())
    key.update(source.read_bytes())
    target = CACHE / "objects" / f"{source.stem}-{key.hexdigest()[:16]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        _run([COMPILER, *flags, "-c", str(source), "-o", str(part)])
        part.replace(target)
    return target


def _digest(paths) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _run(command: list) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")
    return result.stdout
