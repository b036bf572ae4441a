"""build_tree on Metal: arguments as `_C` takes them (csrc/bindings/bind_tree.cpp)."""

from __future__ import annotations

import torch

from inferlab.kernels.metal.checks import check, shape_of
from inferlab.kernels.metal.shaders import Shaders


def build_tree(
    shaders: Shaders,
    parents: torch.Tensor,
    depth: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    ancestors: torch.Tensor,
) -> None:
    check("parents", parents, parents, (None, None), torch.int32)
    if parents.numel() == 0:
        raise ValueError(f"parents has shape {shape_of(parents)}; it must have at least one node")
    batch, nodes = parents.shape
    words = (nodes + 63) // 64
    links = {"depth": depth, "first_child": first_child, "next_sibling": next_sibling}
    for name, link in links.items():
        check(name, link, parents, parents.shape, torch.int32)
    check("ancestors", ancestors, parents, (batch, nodes, words), torch.int64)
    threads = min(256, -(-nodes // 32) * 32)
    args = [parents, *links.values(), ancestors, [nodes, words]]
    shaders.run("build_tree", args, (batch,), threads=threads)
