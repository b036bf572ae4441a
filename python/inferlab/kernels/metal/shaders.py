"""Metal sources -> compiled libraries -> launches, through `torch.mps.compile_shader`.

A source is one of `inferlab/metal/*.metal` with its headers put in place and a few macros in front
(the element type, for one); it is compiled when it is first used and kept. Kernels take tensors,
then the op's parameters, a struct that travels as a list of 64-bit words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from inferlab import _C

SIMD_WIDTH: int = _C.metal.SIMD_WIDTH  # what the kernels are written for: every Apple GPU

_INSTALLED = Path(_C.__file__).parent / "metal"
_INCLUDE = re.compile(r'#include "([^"]+)"\n')


class Shaders:
    """Args:
    compile_source: what takes the place of `torch.mps.compile_shader`, in a test.
    folders: where sources and `"..."` includes are looked for.
    """

    def __init__(
        self,
        compile_source: Callable[[str], Any] | None = None,
        folders: Sequence[Path] = (_INSTALLED, _INSTALLED / "include"),
    ) -> None:
        self._compile = compile_source
        self._folders = folders
        self._libraries: dict[tuple[Any, ...], Any] = {}
        self._functions: dict[tuple[Any, ...], Any] = {}

    def source(self, name: str, **macros: int) -> str:
        """The text of `name`.metal that is compiled: INFERLAB_<macro> defined, headers inlined."""
        defines = "".join(f"#define INFERLAB_{macro} {value}\n" for macro, value in macros.items())
        return defines + self._inlined(f"{name}.metal", set())

    def _inlined(self, name: str, seen: set[str]) -> str:
        if name in seen:
            return ""
        seen.add(name)
        path = next((f / name for f in self._folders if (f / name).exists()), None)
        if path is None:
            raise RuntimeError(
                f"{name} is in none of {', '.join(map(str, self._folders))}: install again"
            )
        text = path.read_text(encoding="ascii").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda m: self._inlined(m[1], seen), text)

    def run(
        self,
        name: str,
        args: Sequence[object],
        grid: Sequence[int],
        *,
        kernel: str,
        threads: int,
        **macros: int,
    ) -> None:
        """Launches `kernel` of `name`.metal on torch's current MPS stream.

        Args:
            args: buffers 0, 1, ... of the kernel: tensors, lists of integers.
            grid: threadgroups in three dimensions; nothing is launched if one is 0.
            threads: of a threadgroup, in one dimension.
            macros: INFERLAB_<macro>, which the source is compiled with.
        """
        if 0 in grid:
            return
        key = (name, kernel, *macros.values())
        function = self._functions.get(key)
        if function is None:
            function = self._function(name, kernel, macros)
            self._functions[key] = function
        x, y, z = grid
        function(*args, threads=[x * threads, y, z], group_size=[threads, 1, 1])

    def _function(self, name: str, kernel: str, macros: dict[str, int]) -> Any:
        key = (name, *macros.values())
        library = self._libraries.get(key)
        if library is None:
            compile_source = self._compile or torch.mps.compile_shader
            library = self._libraries[key] = compile_source(self.source(name, **macros))
        function = getattr(library, kernel)
        if function.thread_execution_width != SIMD_WIDTH:
            raise RuntimeError(
                f"this GPU's simdgroups have {function.thread_execution_width} threads; inferlab's "
                f"Metal kernels need {SIMD_WIDTH} (an Apple GPU)"
            )
        return function
