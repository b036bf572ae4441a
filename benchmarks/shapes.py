"""Shapes as dictionaries of sizes, e.g. {"B": 8, "V": 4096, "dtype": "bf16"}, made into test
parameters: the ones that always run, and the ones of the sweep (`pytest -m sweep`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Shape = dict[str, Any]


def grid(**axes: Sequence[Any]) -> list[Shape]:
    """All combinations: grid(B=[1, 8], V=[4096]) is [{"B": 1, "V": 4096}, {"B": 8, "V": 4096}]."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def label(shape: Shape) -> str:
    """How a shape is written in tables: sizes with their names, words (dtypes, trees) alone."""
    return " ".join(v if isinstance(v, str) else f"{k}={v}" for k, v in shape.items())


def shapes(default: Sequence[Shape], sweep: Sequence[Shape] = ()) -> list[Any]:
    """Parameters for `pytest.mark.parametrize("shape", ...)`."""
    more = [shape for shape in sweep if shape not in default]
    return [pytest.param(shape, id=label(shape).replace(" ", "-")) for shape in default] + [
        pytest.param(shape, id=label(shape).replace(" ", "-"), marks=pytest.mark.sweep)
        for shape in more
    ]
