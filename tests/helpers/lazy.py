"""Tensors far larger than memory, for what 32-bit offsets would break."""

from __future__ import annotations

import math
import mmap

import pytest
import torch

from helpers.backends import Backend

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def zeros(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the backend's device; on the CPU only what is touched takes memory."""
    if backend.device == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        try:
            memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
        except OSError as error:
            pytest.skip(f"cannot map memory without having it: {error}")
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    try:
        return torch.zeros(shape, dtype=dtype, device=backend.device)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"the device has too little memory: {error}")
