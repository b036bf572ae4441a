"""Metal sources as far as a machine without Metal can tell: language, address spaces, memory."""

import itertools
import re

import pytest

from helpers import metal_shim, shim_build
from inferlab.kernels.metal.shaders import Shaders

clang = pytest.importorskip("clang.cindex", reason="libclang is not installed")

METAL = shim_build.CSRC / "metal"
SOURCES = sorted(p.stem for p in METAL.glob("*.metal"))
SHADERS = Shaders(lambda source: source, metal_shim.FOLDERS)
THREADGROUP_BYTES = 32 * 1024  # of every Apple GPU


def variants(name: str) -> list[dict[str, int]]:
    """The macros that a source is compiled with, in all combinations."""
    text = SHADERS.source(name)
    values = {
        macro: choices
        for macro, choices in metal_shim.MACROS.items()
        if re.search(rf"\bINFERLAB_{macro}\b", text)
    }
    return [
        dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())
    ]


ALL = [(name, macros) for name in SOURCES for macros in variants(name)]


def identity(value):
    return "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else value


def errors(source: str) -> list[str]:
    """What clang finds wrong with a source when address spaces are its own."""
    options = [
        *("-x", "c++", "-std=c++17", "-ffreestanding", "-nostdinc", "-Wno-unknown-attributes"),
        *("-DMETAL_SYNTAX_ONLY", f"-D__METAL_VERSION__={metal_shim.METAL_VERSION}"),
        f"-I{shim_build.SHIM}",
    ]
    unit = clang.Index.create().parse("source.cpp", options, [("source.cpp", source)])
    return [str(d) for d in unit.diagnostics if d.severity >= clang.Diagnostic.Error]


@pytest.mark.parametrize(("name", "macros"), ALL, ids=identity)
def test_address_spaces_are_kept_apart(name, macros):
    assert errors(SHADERS.source(name, **macros)) == []


@pytest.mark.parametrize(
    "line",
    [
        "float* p = out;",
        "threadgroup float* p = out;",
        "out = limits;",
        "limits[0] = 1.0f;",
        "float* p = reinterpret_cast<float*>(out);",
        "double x = undeclared;",
    ],
)
def test_mixed_address_spaces_are_caught(line):
    source = """
#include <metal_stdlib>
kernel void k(device float* out [[buffer(0)]], constant float* limits [[buffer(1)]]) {{ {} }}
"""
    assert errors(source.format("out[0] = limits[0];")) == []
    assert errors(source.format(line)) != []


@pytest.mark.parametrize("name", SOURCES)
def test_what_metal_does_not_have(name):
    # Code, without comments: strings and characters do not occur.
    code = re.sub(r"//.*", "", SHADERS.source(name))
    assert code.isascii()  # torch hands the text on as ASCII
    for word in ("double", "thread_local", "throw", "new", "virtual", "goto", "std"):
        host = "#else\n#include <cmath>"  # the branch of other compilers names the standard library
        assert not re.search(rf"\b{word}\b(?!::fma|::memcpy)", code.replace(host, "")), word
    assert not re.search(r"\[[&=]?\w*\]\s*\(", code)  # no lambda before Metal 3.2
    # Constants of a program stand in constant memory.
    for line in code.splitlines():
        assert not re.match(r"(static |inline )*constexpr ", line), line


@pytest.mark.parametrize(("name", "macros"), ALL, ids=identity)
def test_threadgroup_memory_fits(name, macros):
    source = SHADERS.source(name, **macros)
    library = metal_shim.compile_shader(source)
    kernels = dir(library)
    assert kernels
    for kernel in kernels:
        assert getattr(library, kernel).static_thread_group_memory_length <= THREADGROUP_BYTES
    # Nothing else is declared in threadgroup memory.
    declared = re.findall(r"^\s*threadgroup\s+\w+\s+\w+\s*(?:\[.*\])?;", source, re.MULTILINE)
    assert declared == []


@pytest.mark.parametrize("name", SOURCES)
def test_sources_and_their_headers_are_installed(name):
    assert "kernel void" in Shaders(lambda source: source).source(name)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"kv_append\.metal is in none of .*install again"):
        Shaders(lambda source: source, [tmp_path]).source("kv_append")
