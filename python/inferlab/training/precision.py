"""The dtype that weights are multiplied in while training."""

from __future__ import annotations

import torch

from inferlab.machine import cpu_flags

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""A processor with one of these multiplies matrices of bf16; the last is Arm's."""


def training_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies matrices of it, else fp32.

    On CPUs with AVX2 alone torch's products of bf16 take a hundred times as long as those of fp32.
    """
    if device.type == "cpu" and not BF16_FLAGS & cpu_flags():
        return torch.float32
    return torch.bfloat16
