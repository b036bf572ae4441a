"""Who computes an op: the compiled module, Metal or torch's operations; and torch.library entries.

What an op takes is described once, in csrc/bindings (op.h). From there come its argument checks on
every backend, its schema and which of its arguments it writes (`_C.OPS`). Results are allocated by
the wrappers and written by the ops, which return nothing: under torch.compile the wrapper itself is
traced, allocation and all, and an op's fake has nothing left to do. `_C` takes NumPy arrays as they
are; `empty` answers in kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from inferlab import _C
from inferlab.kernels.fallback import TORCH_OPS, Fallback
from inferlab.kernels.metal import MetalOps

LIBRARY = torch.library.Library("inferlab", "FRAGMENT")

# is_compiling() is constant-folded by Dynamo: the eager path never pays for the dispatcher.
is_compiling = torch.compiler.is_compiling

# Device type -> who has the ops there, under the names and with the arguments of `_C`. A device
# that is not listed gets FALLBACK.
FALLBACK = Fallback()
BACKENDS: dict[str, Any] = {"cpu": _C, "mps": MetalOps()}
if _C.build_info()["cuda"] is not None:
    BACKENDS["cuda"] = _C

_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}


def ops_for(array: Any) -> Any:
    """The ops of the array's device (NumPy: the CPU's); under torch.compile those of torch.ops.

    An op returns False where its device has no kernel for the arguments: see `run`.
    """
    if is_compiling():
        return torch.ops.inferlab
    if isinstance(array, np.ndarray) or array.is_cpu:
        return BACKENDS["cpu"]
    return BACKENDS.get(array.device.type, FALLBACK)


def empty(shape: tuple[int, ...], like: Any, dtype: torch.dtype | None = None) -> Any:
    """An uninitialised array of like's kind, device and (unless given) dtype."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype if dtype is None else _NUMPY[dtype])
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def new_workspace(num_bytes: int, like: Any) -> torch.Tensor | None:
    """Scratch memory on like's device; None where an op needs none."""
    if num_bytes == 0:
        return None
    device = "cpu" if isinstance(like, np.ndarray) else like.device
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def run(array: Any, name: str, *args: Any) -> None:
    """The op on the array's device, in torch operations if that has no kernel for the arguments."""
    if getattr(ops_for(array), name)(*args) is False:
        TORCH_OPS[name](*args)


def _register(name: str, schema: str) -> None:
    """Defines `inferlab::<schema>` with one implementation for all devices."""

    def implementation(*args: Any) -> None:
        run(next(arg for arg in args if isinstance(arg, torch.Tensor)), name, *args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"inferlab::{name}", lambda *args: None, lib=LIBRARY)


for _name, (_schema, _) in _C.OPS.items():
    _register(_name, _schema)
