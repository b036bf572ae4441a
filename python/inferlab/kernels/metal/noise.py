"""The noise on Metal: arguments as `_C` takes them (csrc/bindings/bind_system.cpp)."""

from __future__ import annotations

import torch

from inferlab.kernels.metal.checks import check
from inferlab.kernels.metal.shaders import THREADS, Shaders


def gumbel_row(shaders: Shaders, seed: int, position: int, purpose: int, out: torch.Tensor) -> None:
    check("out", out, out, (None,), torch.float32)
    params = [seed, position, purpose, out.numel()]
    grid = (-(-out.numel() // THREADS),)
    shaders.run("noise", [out, params], grid, kernel="gumbel_row")


def philox4x32_10(
    shaders: Shaders, counter: list[int], key: list[int], out: torch.Tensor
) -> torch.Tensor:
    """The block of a counter (four words) and a key (two) into `out`, i32[4]."""
    check("out", out, out, (4,), torch.int32)
    shaders.run("noise", [out, [*counter, *key]], (1,), kernel="philox", threads=32)
    return out
