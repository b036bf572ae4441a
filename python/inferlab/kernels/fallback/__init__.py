"""The ops where a device has no kernel for them: torch operations there, else the CPU's kernels.

Shapes, dtypes and layouts are checked as everywhere; values are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from inferlab import _C
from inferlab.kernels.fallback.attention import paged_tree_attention
from inferlab.kernels.fallback.growth import grow_level, grow_offsets, grow_tree
from inferlab.kernels.fallback.kv import kv_append, kv_compact, kv_copy_pages, kv_gather
from inferlab.kernels.fallback.layer import linear, rms_norm, rope_append, silu_mul

# Name -> the op with the arguments of `_C`, in torch operations.
TORCH_OPS: dict[str, Callable[..., None]] = {
    op.__name__: op
    for op in (
        paged_tree_attention,
        grow_level,
        grow_offsets,
        grow_tree,
        kv_append,
        kv_compact,
        kv_copy_pages,
        kv_gather,
        linear,
        rms_norm,
        rope_append,
        silu_mul,
    )
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
