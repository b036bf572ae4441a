"""Builds CUDA sources for the CPU (tests/native/shim): the compiled module, or a test program.

The module is a `_C` whose ops run csrc/cuda on CPU tensors. The CPU kernels are not in it: nothing
calls them, and symbols are bound when they are first called. Objects are kept under build/shim by
the hash of what they were made from, so only what changed is compiled again.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
CPU = CSRC / "cpu"
SHIM = ROOT / "tests" / "native" / "shim"
CACHE = ROOT / "build" / "shim"
COMPILER = os.environ.get("CXX", "g++")

# Flags of the kernels, which are instrumented, and of the fibres, which tell the sanitizers
# themselves what they do.
VARIANTS: dict[str, tuple[list[str], list[str]]] = {
    "plain": ([], []),
    "asan": (["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], ["-DSIMT_ASAN"]),
    # A volatile access counts as a relaxed atomic one (sanitize.h).
    "tsan": (["-fsanitize=thread", "--param=tsan-distinguish-volatile=1"], ["-DSIMT_TSAN"]),
    "ucontext": ([], ["-DSIMT_UCONTEXT"]),  # plain, by the way that every processor has
}
SANITIZER_LIBRARIES = {"asan": "libasan.so", "tsan": "libtsan.so"}
# The first report ends the process. Python and torch leak by design.
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
# -O1 -g1: quick to compile, and the sanitizers' traces can be read.
BASE = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
CLASSES = (CSRC / "cpu" / "suffix_automaton.cpp", *sorted((CSRC / "planner").glob("*.cpp")))
DEFINES = [
    "-DINFERLAB_WITH_CUDA=1",
    "-DINFERLAB_CUDA_SHIM=1",
    '-DINFERLAB_CUDA_VERSION="shim"',
    '-DINFERLAB_CUDA_ARCHS="shim"',
    '-DINFERLAB_VERSION="shim"',
    '-DINFERLAB_COMPILER="shim"',
]


@dataclass(frozen=True)
class Job:
    """One object file: what it is compiled from, how, and where its headers are looked for."""

    source: Path
    flags: list[str]
    include: list[Path]
    system: tuple[str, ...] = ()  # include paths whose files do not count as ours
    compiler: str = COMPILER


def build(variant: str = "plain", cuda_dir: Path = CUDA, units: Sequence[str] = ()) -> Path:
    """The module's path.

    Arguments:
    cuda_dir: may be a changed copy of csrc/cuda.
    units: the sources that are taken from it, if not all. They are linked first, so that of inline
        functions theirs stay.

    Raises:
        RuntimeError: something does not compile; holds the compiler's words.
    """
    import pybind11

    python = (pybind11.get_include(), sysconfig.get_path("include"))
    include = [CSRC, CSRC / "include", CSRC / "bindings", CSRC / "cpu"]
    bindings = [
        Job(source, [*BASE, "-g0", *DEFINES], include, python)
        # The CPU's ops are resolved when they are called, which nobody does. A class cannot wait.
        for source in (_bindings(), *CLASSES)
    ]
    names = sorted(path.name for path in cuda_dir.glob("*.cu"))
    changed = [name for name in names if name in (units or names)]
    kernels = [_kernel(cuda_dir / name, variant, cuda_dir) for name in changed]
    kernels += [_kernel(CUDA / name, variant, CUDA) for name in names if name not in changed]
    objects = _compile_all([*kernels, *bindings, _runtime(variant)])
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return _link(objects, ["-shared", "-Wl,-z,lazy", *VARIANTS[variant][0]], f"{variant}-", name)


def build_program(source: Path, variant: str) -> Path:
    """A program of one .cu file, with all that csrc/cuda/launch.cuh needs."""
    kernels = [_kernel(path, variant, CUDA) for path in (source, CUDA / "device.cu")]
    objects = _compile_all([*kernels, _runtime(variant)])
    return _link(objects, VARIANTS[variant][0], f"{variant}-", source.stem)


def build_cpu_program(
    source: Path, variant: str, cpu_dir: Path = CPU, machine: str = platform.machine()
) -> Path:
    """A program of one C++ source and all of csrc/cpu, for every instruction set that there is.

    Args:
        cpu_dir: may be a changed copy of csrc/cpu.
        machine: that it is for; of another one than this the program holds all its libraries.
    """
    is_here = machine == platform.machine()
    compiler = COMPILER if is_here else cross_compiler(machine)
    flags = [*BASE, *WARNINGS, *VARIANTS[variant][0]]
    include = [cpu_dir, CSRC, CSRC / "include"]
    sources = (source, *sorted(cpu_dir.glob("*.cpp")))
    jobs = [Job(path, flags, include, compiler=compiler) for path in sources]
    for isa, own in _isas(machine).items():
        names = [f"-DINFERLAB_ISA={isa}", f"-DINFERLAB_ISA_{isa.upper()}=1"]
        unsure = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # see cmake/Simd.cmake
        jobs += [
            Job(path, [*flags, *unsure, *own, *names], include, compiler=compiler)
            for path in sorted((cpu_dir / "kernels").glob("*.cpp"))
        ]
    links = [*VARIANTS[variant][0], "-pthread", "-ldl", *([] if is_here else ["-static"])]
    return _link(_compile_all(jobs), links, f"{variant}-{machine}-", source.stem, compiler)


def cross_compiler(machine: str) -> str:
    """The compiler for another machine, by Debian's name."""
    return f"{machine}-linux-gnu-g++"


def _isas(machine: str) -> dict[str, list[str]]:
    """Flags of each instruction set, as cmake/Simd.cmake has them for a processor."""
    text = (ROOT / "cmake" / "Simd.cmake").read_text()
    flags: dict[str, list[str]] = {}
    for isa, own in re.findall(r"set\(flags_(\w+) ([^)]*)\)", text):
        words = own.replace('"', "").split()
        flags[isa] = [f for word in words for f in flags.get(word[8:-1], [word])]
    is_x86 = machine in ("x86_64", "AMD64", "amd64")
    return {isa: own for isa, own in flags.items() if (isa != "generic") == is_x86}


def build_library(source: Path, flags: list[str], variant: str) -> Path:
    """A shared object of one C++ source. All of them share the fibres, which TSan has few of."""
    shared = ["-shared", *VARIANTS[variant][0]]
    fibres = _runtime(variant)
    fibres = replace(fibres, flags=[*fibres.flags, "-fvisibility=default"])
    runtime = _link([_compile(fibres)], shared, f"{variant}-", "simt.so")
    unit = Job(source, [*BASE, *WARNINGS, *flags, *VARIANTS[variant][0]], [SHIM])
    return _link([_compile(unit), runtime], shared, f"{variant}-", f"{source.stem}.so")


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


def runtime_libraries(variant: str) -> list[Path]:
    """What must be loaded before Python itself (LD_PRELOAD): the sanitizer's library and, so that
    it finds what throws, the C++ one. Empty where the compiler has no such sanitizer.
    """
    names = (SANITIZER_LIBRARIES[variant], "libstdc++.so.6")
    found = [Path(_run([COMPILER, f"-print-file-name={name}"]).strip()) for name in names]
    return [path.resolve() for path in found] if found[0].is_absolute() else []


def _bindings() -> Path:
    """A source that includes all of csrc/bindings: pybind11's headers are most of the work."""
    sources = sorted((CSRC / "bindings").glob("*.cpp"))
    text = "".join(f'#include "{path.name}"\n' for path in sources)
    target = CACHE / f"bindings-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}")
        part.write_text(text)
        part.replace(target)
    return target


def _kernel(source: Path, variant: str, cuda_dir: Path) -> Job:
    flags = ["-x", "c++", *BASE, *WARNINGS, *DEFINES, *VARIANTS[variant][0]]
    return Job(source, flags, [SHIM, CSRC / "include", cuda_dir])


def _runtime(variant: str) -> Job:
    return Job(SHIM / "simt.cpp", [*BASE, *WARNINGS, "-O2", *VARIANTS[variant][1]], [SHIM])


def _compile_all(jobs: list[Job]) -> list[Path]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_compile, jobs))


def _compile(job: Job) -> Path:
    # Not the folders' names: a copy of a source is the same source.
    key = hashlib.sha256(" ".join([job.compiler, *job.flags]).encode())
    for path in sorted(_sources(job.source, job.include), key=lambda p: p.name):
        key.update(path.name.encode() + path.read_bytes())
    target = CACHE / "objects" / f"{job.source.stem}-{key.hexdigest()[:16]}.o"
    include = [f"-I{path}" for path in (*job.include, *job.system)]
    _make(target, [job.compiler, *job.flags, *include, "-c", job.source])
    return target


def _sources(source: Path, include: list[Path]) -> set[Path]:
    """The file and all headers of ours that it includes."""
    seen, todo = set(), [source]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', path.read_text(), re.M):
            found = (folder / name for folder in (path.parent, *include))
            todo.extend([p for p in found if p.exists()][:1])
    return seen


def _link(
    objects: list[Path], flags: Iterable[str], prefix: str, name: str, compiler: str = COMPILER
) -> Path:
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    target = CACHE / f"{prefix}{key}" / name
    _make(target, [compiler, *objects, *flags])
    return target


def _make(target: Path, command: list) -> None:
    """Runs `command` with `-o target`, unless the target is there. Others may do the same."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}")
    _run([*command, "-o", part])
    part.replace(target)


def _run(command: list) -> str:
    # A sanitizer that is loaded into Python is not meant for the compiler.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")
    return result.stdout
