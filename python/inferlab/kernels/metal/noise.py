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
