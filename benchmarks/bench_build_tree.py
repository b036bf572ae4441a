"""build_tree: a batch of draft trees, as every speculative step builds it."""

from typing import Any

import pytest
import torch

import floors
import torch_ways
from inferlab.kernels import build_tree
from inputs import TREES, parents_of
from shapes import grid, shapes


@pytest.mark.parametrize(
    "shape",
    shapes(
        [
            *grid(B=[1], N=[5, 64], tree=["binary"]),
            *grid(B=[32], N=[64], tree=TREES),
            *grid(B=[8], N=[256], tree=["binary"]),
        ],
        sweep=grid(B=[1, 8, 64, 256], N=[2, 16, 64, 256], tree=TREES),
    ),
)
def bench_build_tree(kernel_bench: Any, device: Any, shape: dict[str, Any]) -> None:
    batch, nodes = shape["B"], shape["N"]
    parents = torch.tensor([parents_of(shape["tree"], nodes)] * batch, dtype=torch.int32)
    kernel_bench(
        "build_tree",
        "",
        shape,
        build_tree,
        [parents.to(device.torch)],
        num_bytes=floors.build_tree(batch, nodes),
        bound=None,
        torch_fn=torch_ways.build_tree,
    )
