"""Shapes as dictionaries of sizes, e.g. {"B": 8, "V": 4096, "dtype": "bf16"}, made into test
parameters: the ones that always run, and the ones of the sweep (`pytest -m sweep`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

from table import Shape, label

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def grid(**axes: Iterable[Any]) -> list[Shape]:
    """All combinations: grid(B=[1, 8], V=[4096]) is [{"B": 1, "V": 4096}, {"B": 8, "V": 4096}]."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def shapes(default: Sequence[Shape], sweep: Sequence[Shape] = ()) -> list[Any]:
    """Parameters for `pytest.mark.parametrize("shape", ...)`; -k finds B8-V4096-bf16."""

    def parameter(shape: Shape, *marks: Any) -> Any:
        return pytest.param(shape, id=label(shape).replace("=", "").replace(" ", "-"), marks=marks)

    more = [shape for shape in sweep if shape not in default]
    return [parameter(s) for s in default] + [parameter(s, pytest.mark.sweep) for s in more]
