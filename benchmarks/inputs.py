"""Inputs that several benchmarks share: logits like a language model's, trees, paged K and V."""

from __future__ import annotations

from typing import NamedTuple

import torch

import torch_ways
from inferlab.kernels import advise_large_pages, build_tree
from measure import Device
from shapes import DTYPES, Shape

PAGE_SIZE = 16
TREES = ("binary", "chain")


def language_logits(device: Device, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits spread like a language model's: a wide bulk and a few tokens far above it."""
    logits = device.randn(*shape) * 2.5
    head = device.randint(shape[-1], *shape[:-1], 40)
    return logits.scatter_add_(-1, head, device.rand(*head.shape) * 12).to(dtype)


def parents_of(tree: str, nodes: int) -> list[int]:
    """Parent links of a complete binary tree in level order, or of a chain."""
    return [-1] + [(n - 1) // 2 if tree == "binary" else n - 1 for n in range(1, nodes)]


def children_of(parents: list[int]) -> torch.Tensor:
    """Children of each node, [N, C] i64, -1 pads."""
    below = [[c for c, p in enumerate(parents) if p == n] for n in range(len(parents))]
    width = max(1, *(len(c) for c in below))
    return torch.tensor([c + [-1] * (width - len(c)) for c in below])


def levels_of(parents: list[int]) -> int:
    """Nodes on the longest path from the root."""
    depth: list[int] = []
    for parent in parents:
        depth.append(1 if parent < 0 else depth[parent] + 1)
    return max(depth)


def block_table(device: Device, batch: int, slots: int, page_size: int) -> torch.Tensor:
    """Page ids of `batch` sequences of `slots` slots, shuffled over the pool, [B, pages] i32."""
    each = (slots + page_size - 1) // page_size
    order = torch.randperm(batch * each, generator=device.generator, device=device.torch)
    return order.int().reshape(batch, each)


class AttentionCase(NamedTuple):
    q: torch.Tensor  # [B, N, Hq, D]
    k_pages: torch.Tensor  # [P, page_size, Hkv, D]
    v_pages: torch.Tensor
    table: torch.Tensor  # [B, pages]
    lens: torch.Tensor  # [B]
    length: int  # the same, of every sequence
    ancestors: torch.Tensor | None
    mask: torch.Tensor | None  # [N, length + N] where there are ancestors
    keys: torch.Tensor  # [B, Hkv, length + N, D], dense, for torch
    values: torch.Tensor


def attention_shape(
    b: int, n: int, tree: str, hq: int, hkv: int, d: int, length: int, dtype: str
) -> Shape:
    heads = {"Hq": hq, "Hkv": hkv, "D": d}
    return {"B": b, "N": n, "tree": tree, **heads, "L": length, "dtype": dtype}


def kv_pool(device: Device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random pages in large pages of the system, where it has them: torch.zeros would have filled
    small ones before it could be asked."""
    pages = torch.empty(shape, dtype=dtype, device=device.torch)
    if pages.is_cpu:
        advise_large_pages(pages)
    return pages.copy_(device.randn(*shape, dtype=dtype))


def attention_case(device: Device, s: Shape) -> AttentionCase:
    batch, nodes, dim, length, dtype = s["B"], s["N"], s["D"], s["L"], DTYPES[s["dtype"]]
    q_heads, kv_heads = s["Hq"], s["Hkv"]
    table = block_table(device, batch, length + nodes, PAGE_SIZE)
    pool = (table.numel(), PAGE_SIZE, kv_heads, dim)
    k, v = (kv_pool(device, pool, dtype) for _ in range(2))
    q = device.randn(batch, q_heads, nodes, dim, dtype=dtype).transpose(1, 2)
    lens = torch.full((batch,), length, dtype=torch.int32, device=device.torch)
    ancestors = mask = None
    if s["tree"] != "chain":
        parents = torch.tensor([parents_of(s["tree"], nodes)] * batch, dtype=torch.int32)
        ancestors = build_tree(parents).ancestors.to(device.torch)
        prefix = torch.ones(nodes, length, dtype=torch.bool)
        mask = torch.cat((prefix, torch_ways.build_tree(parents[:1])[3][0]), 1).to(device.torch)
    keys, values = (
        x[table.long()].flatten(1, 2)[:, : length + nodes].transpose(1, 2).contiguous()
        for x in (k, v)
    )
    return AttentionCase(q, k, v, table, lens, length, ancestors, mask, keys, values)
