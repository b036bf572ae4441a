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
# Words of the language that C++ has no objection to.
KEYWORDS = {"half", "bfloat", "thread", "device", "constant", "threadgroup", "kernel", "vertex"}
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


def parse(source: str):
    """The source as clang sees it when address spaces are its own."""
    options = [
        *("-x", "c++", "-std=c++17", "-ffreestanding", "-nostdinc", "-Wno-unknown-attributes"),
        *("-DMETAL_SYNTAX_ONLY", f"-D__METAL_VERSION__={metal_shim.METAL_VERSION}"),
        f"-I{shim_build.SHIM}",
    ]
    return clang.Index.create().parse("source.cpp", options, [("source.cpp", source)])


def errors(source: str) -> list[str]:
    return [str(d) for d in parse(source).diagnostics if d.severity >= clang.Diagnostic.Error]


def forbidden(source: str) -> set[str]:
    """What stands in a source that clang takes for C++ and Metal does not take."""
    found = set()
    kinds = clang.CursorKind
    variables = (kinds.VAR_DECL, kinds.PARM_DECL, kinds.FIELD_DECL)
    for cursor in parse(source).cursor.walk_preorder():
        if cursor.location.file is None or cursor.location.file.name != "source.cpp":
            continue
        where = f"line {cursor.location.line}: "
        if cursor.type.kind == clang.TypeKind.DOUBLE:
            found.add(where + "double")
        if cursor.kind in (kinds.LAMBDA_EXPR, kinds.CXX_NEW_EXPR, kinds.CXX_THROW_EXPR):
            found.add(where + cursor.kind.name)
        if cursor.kind in variables and cursor.spelling in KEYWORDS:
            found.add(where + cursor.spelling)
        outside = cursor.semantic_parent and cursor.semantic_parent.kind in (
            kinds.TRANSLATION_UNIT,
            kinds.NAMESPACE,
        )
        if cursor.kind == kinds.VAR_DECL and outside and not cursor.type.get_address_space():
            found.add(where + f"{cursor.spelling} is not in constant memory")
    return found


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
    source = SHADERS.source(name, **variants(name)[0])
    assert source.isascii()  # torch hands the text on as ASCII
    assert forbidden(source) == set()


@pytest.mark.parametrize(
    "line",
    [
        "out[0] = 0.5 * out[0];",
        "float half = 1.0f;",
        "auto f = [](float x) { return x; }; out[0] = f(out[0]);",
        "out[0] = 1.0f; } constexpr float kGlobal = 1.0f; void f() {",
    ],
)
def test_what_metal_does_not_have_is_caught(line):
    source = "#include <metal_stdlib>\nkernel void k(device float* out [[buffer(0)]]) {{ {} }}\n"
    assert forbidden(source.format("out[0] = 0.5f * out[0];")) == set()
    assert forbidden(source.format(line)) != set()


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
