"""The ops where a device has no kernel for them: torch operations there, else the CPU's kernels.

Shapes, dtypes and layouts are checked as everywhere; values are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from inferlab import _C
from inferlab.kernels.fallback import attention, growth, kv, layer

# Name -> the op with the arguments of `_C`, in torch operations.
TORCH_OPS: dict[str, Callable[..., None]] = {
    name: getattr(room, name)
    for room in (attention, growth, kv, layer)
    for name in _C.OPS
    if hasattr(room, name)
}


class Fallback:
    """`_C`'s op functions as attributes, for tensors of any device."""

    def __init__(self) -> None:
        for name in _C.OPS:
            setattr(self, name, partial(_checked if name in TORCH_OPS else _on_the_cpu, name))

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_workspace_bytes"):
            return lambda *args: 0
        raise AttributeError(f"inferlab has no op {name!r}")


def _checked(name: str, *args: Any) -> None:
    """The op in torch operations, after the checks that Metal's launches make too."""
    getattr(_C.metal, name)(_launch_nothing, *args)
    TORCH_OPS[name](*args)


def _launch_nothing(*args: Any, **options: Any) -> None:
    pass


def _on_the_cpu(name: str, *args: Any) -> None:
    """The CPU's kernel on copies; what it has written goes back."""
    here = [arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args]
    getattr(_C, name)(*here)
    _, written = _C.OPS[name]
    for index in written:
        if args[index] is not None:
            args[index].copy_(here[index])
