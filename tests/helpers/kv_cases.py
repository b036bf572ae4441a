"""Random paged caches and draft trees: the cases that attention and the KV ops are tested on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from inferlab.kernels.reference.kv import as_stored

BITS_8 = {"int8": torch.int8, "fp8": torch.uint8}
"""What pages of 8 bits are told by."""


def pages_of(rows: torch.Tensor, stored: str | None) -> torch.Tensor:
    """Pages that hold these numbers; None: as they are."""
    return rows if stored is None else as_stored(rows, torch.empty(0, dtype=BITS_8[stored]))


@dataclass(frozen=True)
class AttentionCase:
    """Arguments of paged_tree_attention. Slots and pages that nothing uses hold NaN."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    ancestors: torch.Tensor | None
    options: dict[str, Any]

    def run(self, op: Any, **extra: Any) -> torch.Tensor:
        return op(
            self.q,
            self.k_pages,
            self.v_pages,
            self.block_table,
            self.seq_lens,
            self.ancestors,
            **self.options,
            **extra,
        )

    def with_options(self, **options: Any) -> AttentionCase:
        return replace(self, options={**self.options, **options})


def random_parents(nodes: int, generator: torch.Generator) -> list[int]:
    """A tree in topological order: deep chains and bushes alike."""
    parents = [-1]
    for n in range(1, nodes):
        deep = torch.rand((), generator=generator).item() < 0.6
        parents.append(n - 1 if deep else int(torch.randint(n, (), generator=generator)))
    return parents


def ancestor_words(parents: list[int]) -> torch.Tensor:
    """i64[N, ceil(N / 64)]: bit j of row n says that node j is n or an ancestor of n."""
    words = (len(parents) + 63) // 64
    rows: list[int] = []
    for n, parent in enumerate(parents):
        rows.append((rows[parent] if parent >= 0 else 0) | 1 << n)
    out = torch.zeros(len(parents), words, dtype=torch.int64)
    for n, row in enumerate(rows):
        for w in range(words):
            word = row >> 64 * w & (1 << 64) - 1
            out[n, w] = word - (1 << 64) if word >= 1 << 63 else word
    return out


def path_of(parents: list[int], node: int) -> list[int]:
    """Root to node."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def block_table(lens: list[int], page_size: int, generator: torch.Generator) -> torch.Tensor:
    """Random distinct pages, as many as each length needs, -1 behind them. One page stays free."""
    counts = [(n + page_size - 1) // page_size for n in lens]
    ids = torch.randperm(sum(counts) + 1, generator=generator).int().tolist()
    table = torch.full((len(lens), max(counts) + 1), -1, dtype=torch.int32)
    for b, count in enumerate(counts):
        for i in range(count):
            table[b, i] = ids.pop()
    return table


def poisoned_pages(
    table: torch.Tensor,
    lens: list[int],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> torch.Tensor:
    """[P, page_size, Hkv, D]: normal numbers in the first lens[b] slots, NaN everywhere else."""
    page_size, heads, dim = shape
    num_pages = int((table >= 0).sum()) + 1
    pages = torch.full((num_pages, page_size, heads, dim), float("nan"))
    for b, n in enumerate(lens):
        slots = torch.arange(n)
        rows = torch.randn(n, heads, dim, generator=generator)
        pages[table[b, slots // page_size].long(), slots % page_size] = rows
    return pages.to(dtype)


def attention_case(
    seed: int,
    lens: list[int],
    nodes: int,
    *,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    stored: str | None = None,
    tree: bool = True,
    ragged: bool = False,
    node_offset: int = 0,
    **options: Any,
) -> AttentionCase:
    """A case with `nodes` query rows per sequence, behind `node_offset` nodes that came before."""
    g = torch.Generator().manual_seed(seed)
    counts = [nodes] * len(lens)
    if ragged:
        counts = [int(torch.randint(nodes + 1, (), generator=g)) for _ in lens]
        options["num_nodes"] = torch.tensor(counts, dtype=torch.int32)
    used = [n + (node_offset + c if c else 0) for n, c in zip(lens, counts, strict=True)]
    table = block_table(used, page_size, g)
    shape = (page_size, kv_heads, dim)
    words = None
    if tree:
        rows = [ancestor_words(random_parents(node_offset + nodes, g))[node_offset:] for _ in lens]
        words = torch.stack(rows)
    q = torch.randn(len(lens), kv_heads * group, nodes, dim, generator=g).to(dtype).transpose(1, 2)
    return AttentionCase(
        q=q,
        k_pages=pages_of(poisoned_pages(table, used, shape, dtype, g), stored),
        v_pages=pages_of(poisoned_pages(table, used, shape, dtype, g), stored),
        block_table=table,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        ancestors=words,
        options={"scale": dim**-0.5, "node_offset": node_offset, **options},
    )
