"""Who computes an op: the compiled module, Metal or the reference; and torch.library entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from inferlab import _C
from inferlab.kernels.metal import MetalOps

LIBRARY = torch.library.Library("inferlab", "FRAGMENT")

# is_compiling() is constant-folded by Dynamo: the eager path never pays for the dispatcher.
is_compiling = torch.compiler.is_compiling

# Device type -> who has the ops there, under the names and with the arguments of `_C`. A device
# that is not listed gets the torch reference.
BACKENDS: dict[str, Any] = {"cpu": _C, "mps": MetalOps()}
if _C.build_info()["cuda"] is not None:
    BACKENDS["cuda"] = _C


def ops_for(array: Any) -> Any:
    """The ops of the array's device (NumPy: the CPU's), or None where only the reference serves."""
    if isinstance(array, np.ndarray) or array.is_cpu:
        return BACKENDS["cpu"]
    return BACKENDS.get(array.device.type)


def empty(shape: tuple[int, ...], like: Any, dtype: torch.dtype | None = None) -> Any:
    """An uninitialised array of like's kind, device and (unless given) dtype."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def new_workspace(num_bytes: int, like: Any) -> torch.Tensor | None:
    """Scratch memory on like's device; None where an op needs none."""
    if num_bytes == 0:
        return None
    device = "cpu" if isinstance(like, np.ndarray) else like.device
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def register(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines `inferlab::<schema>` with one implementation for all devices and its shape rule."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"inferlab::{name}", fake, lib=LIBRARY)


def is_numpy(value: object) -> bool:
    return isinstance(value, np.ndarray)


def as_tensor(value: Any) -> torch.Tensor:
    """A torch view of a NumPy array; tensors pass unchanged."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
