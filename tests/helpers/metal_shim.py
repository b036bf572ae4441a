"""`torch.mps.compile_shader` for machines without Metal: the source compiled as C++ and run on the
CPU (tests/native/shim/metal_stdlib). The shared objects are kept under build/shim.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers import shim_build
from inferlab.kernels.metal import MetalOps
from inferlab.kernels.metal.shaders import Shaders

FOLDERS = (shim_build.CSRC / "metal", shim_build.CSRC / "include")
METAL_VERSION = 310  # the oldest that torch compiles for
FLAGS = [
    f"-D__METAL_VERSION__={METAL_VERSION}",
    # GPU compilers have no strict aliasing either; attributes are Metal's.
    *("-fno-strict-aliasing", "-Wno-attributes"),
]
# The macros that sources are compiled with (INFERLAB_<name>) and their values.
MACROS = {"WORD": (2, 16), "ELEMENT": (0, 1, 2), "HEAD_CHUNKS": (2, 4, 8), "GROUP": (32, 256)}

SOURCES = shim_build.CACHE / "metal"

_KERNEL = re.compile(r"^kernel\s+void\s+(\w+)\(([^{]*?)\)\s*\{", re.MULTILINE)
_PARAMETER = re.compile(r"(?P<type>.*?[*&\s])(?P<name>\w+)\s*\[\[(?P<attribute>[^\]]+)\]\]", re.S)
_SHARED = re.compile(r"^\s*INFERLAB_SHARED\((\w+), \w+\)", re.MULTILINE)
_BUILT_IN = {
    "threadgroup_position_in_grid": "uint3{t.block.x, t.block.y, t.block.z}",
    "threadgroups_per_grid": "uint3{t.grid_dim.x, t.grid_dim.y, t.grid_dim.z}",
    "threads_per_threadgroup": "uint3{t.block_dim.x, t.block_dim.y, t.block_dim.z}",
    "thread_index_in_threadgroup": "t.thread.x",  # threadgroups have one dimension
}


@dataclass(frozen=True)
class Kernel:
    """Attributes:
    arguments: C++ expressions that make the kernel's arguments from `p[i]` and the thread `t`.
    constants: (buffer, type) of the structs that travel by value.
    """

    name: str
    arguments: list[str]
    buffers: int
    constants: list[tuple[int, str]]
    shared: str | None


def kernels_of(source: str) -> list[Kernel]:
    """The kernels of a Metal source whose headers are inlined."""
    found = []
    starts = list(_KERNEL.finditer(source))
    for match, following in zip(starts, [*starts[1:], None], strict=True):
        arguments, constants, buffers = [], [], 0
        for parameter in re.split(r",(?![^\[]*\]\])", match[2]):
            part = _PARAMETER.match(parameter.strip())
            assert part is not None, f"{match[1]}: {parameter}"
            kind, attribute = part["type"].strip(), part["attribute"].strip()
            if attribute in _BUILT_IN:
                arguments.append(_BUILT_IN[attribute])
                continue
            index = int(attribute.removeprefix("buffer(").removesuffix(")"))
            assert index == buffers, f"{match[1]}: buffer {index} comes as number {buffers}"
            buffers += 1
            if kind.endswith("&"):
                struct = kind.removeprefix("constant").removesuffix("&").strip()
                constants.append((index, struct))
                arguments.append(f"*static_cast<const {struct}*>(p[{index}])")
            else:
                arguments.append(f"static_cast<{kind}>(p[{index}])")
        body = source[match.end() : following.start() if following else None]
        shared = _SHARED.search(body)
        found.append(Kernel(match[1], arguments, buffers, constants, shared[1] if shared else None))
    return found


def entry_points(source: str) -> str:
    """C++ that launches the source's kernels by name."""
    code = [
        "\n#undef thread  // Metal's address space; simt.h has a member of that name",
        '#define ENTRY extern "C" __attribute__((visibility("default")))',
        "ENTRY const char* simt_launch(void (*body)(void*), void* arg, const unsigned* grid,",
        "                              unsigned threads, unsigned long shared) {",
        "  const simt::Dim blocks{grid[0], grid[1], grid[2]}, block{threads, 1, 1};",
        "  const bool done = simt::launch(blocks, block, shared, false, body, arg);",
        "  return done ? nullptr : simt::last_error();",
        "}",
    ]
    for k in kernels_of(source):
        shared = f"sizeof({k.shared})" if k.shared else "0"
        sizes = ", ".join(f"{{{i}, sizeof({struct})}}" for i, struct in k.constants)
        code += [
            f"ENTRY void {k.name}_body(void* arg) {{",
            "  [[maybe_unused]] const simt::Thread& t = *simt::self;",
            "  void** p = static_cast<void**>(arg);",
            f"  {k.name}({', '.join(k.arguments)});",
            "}",
            f"ENTRY const unsigned long {k.name}_shared = {shared};",
            f"ENTRY const unsigned long {k.name}_buffers = {k.buffers};",
            f"ENTRY const unsigned long {k.name}_constants[][2] = {{{sizes}{', ' * bool(sizes)}"
            "{~0ul, 0}};",
        ]
    return "\n".join(code)


class Library:
    """What `torch.mps.compile_shader` returns: kernels as attributes."""

    def __init__(self, path: Path, kernels: list[Kernel]) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.simt_launch.restype = ctypes.c_char_p
        self._kernels = {k.name: k for k in kernels}

    def __dir__(self) -> list[str]:
        return list(self._kernels)

    def __getattr__(self, name: str) -> Function:
        return Function(self._library, self._kernels[name])


class Function:
    """One kernel. Called as torch's are: tensors and lists of numbers, then the grid."""

    thread_execution_width = 32

    def __init__(self, library: ctypes.CDLL, kernel: Kernel) -> None:
        self._library = library
        self._name = kernel.name
        self._body = getattr(library, f"{kernel.name}_body")
        self._buffers = kernel.buffers
        self.static_thread_group_memory_length = self._number("shared")
        pairs = (ctypes.c_ulong * 2 * (len(kernel.constants) + 1)).in_dll(
            library, f"{kernel.name}_constants"
        )
        self._sizes = {index: size for index, size in pairs if size}

    def _number(self, name: str) -> int:
        return ctypes.c_ulong.in_dll(self._library, f"{self._name}_{name}").value

    def __call__(self, *args: Any, threads: list[int], group_size: list[int]) -> None:
        assert len(args) == self._buffers, f"{self._name} takes {self._buffers} buffers"
        assert len(args) <= 31, "Metal has 31 buffers"
        assert len(threads) == len(group_size) <= 3
        assert all(n % g == 0 for n, g in zip(threads, group_size, strict=True))
        assert group_size[1:] == [1] * len(group_size[1:])
        assert group_size[0] <= 1024
        values = [self._value(i, a) for i, a in enumerate(args)]
        pointers = (ctypes.c_void_p * len(values))(
            *(v.data_ptr() if isinstance(v, torch.Tensor) else ctypes.addressof(v) for v in values)
        )
        grid = [n // g for n, g in zip(threads, group_size, strict=True)] + [1, 1]
        error = self._library.simt_launch(
            self._body,
            pointers,
            (ctypes.c_uint * 3)(*grid[:3]),
            ctypes.c_uint(group_size[0]),
            ctypes.c_ulong(self.static_thread_group_memory_length),
        )
        if error is not None:
            raise RuntimeError(f"{self._name}: {error.decode()}")

    def _value(self, index: int, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            assert index not in self._sizes, f"{self._name}: argument {index} is a struct"
            assert value.numel() > 0, f"{self._name}: argument {index} has no memory to bind"
            return value
        kind: Any = ctypes.c_float if isinstance(value[0], float) else ctypes.c_int64
        assert all(isinstance(x, type(value[0])) for x in value), "a list is of one type"
        packed = (kind * len(value))(*value)
        have, want = ctypes.sizeof(packed), self._sizes.get(index)
        assert have == want, f"{self._name}: argument {index} has {have} bytes, its struct {want}"
        return packed


def compile_shader(source: str, variant: str = "plain") -> Library:
    """Compiles and loads a source; variant: a key of shim_build.VARIANTS.

    Raises:
        RuntimeError: it does not compile; holds the compiler's words.
    """
    kernels = kernels_of(source)
    text = source + entry_points(source)
    path = SOURCES / f"{kernels[0].name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return Library(shim_build.build_library(path, FLAGS, variant), kernels)


def metal_ops(variant: str = "plain", folders: tuple[Path, ...] = FOLDERS) -> MetalOps:
    """Metal's ops on CPU tensors. `folders` may hold changed copies of csrc/metal."""
    return MetalOps(Shaders(lambda source: compile_shader(source, variant), folders))
