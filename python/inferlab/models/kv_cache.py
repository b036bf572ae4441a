"""The paged K/V cache of one model: pools of pages, and the two moves that speculation needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from inferlab.kernels import advise_large_pages, kv_compact, kv_copy_pages


class PageFormat(NamedTuple):
    """How pages hold the numbers of a head in 8 bits each.

    Attributes:
        dtype: what the kernels know the format by.
        scale_bytes: behind each head's numbers.
    """

    dtype: torch.dtype
    scale_bytes: int


PAGE_FORMATS = {"int8": PageFormat(torch.int8, 4), "fp8": PageFormat(torch.uint8, 0)}
"""By name: int8 with a float32 scale for each token and head, and float8 e4m3 without one."""


class Pool(NamedTuple):
    """Layers of one shape, stacked: k and v are [L, P, page_size, Hkv, D]; with a `PageFormat` D is
    the bytes of a head."""

    layers: tuple[int, ...]
    k: torch.Tensor
    v: torch.Tensor


class KVCache:
    """K/V pages of all layers of a model.

    Layers that share (Hkv, D) and a device are stacked into one pool, so that compaction and page
    copies are one kernel call per pool; nearly all models have a single pool.

    Args:
        shapes: (num_kv_heads, head_dim) per layer.
        num_pages: pages per layer; one block table addresses all layers.
        page_size: tokens per page, a power of two.
        dtype, device: of the pages.
        devices: of each layer's pages, where they are not all on ``device``.
        kv_cache_dtype: of `PAGE_FORMATS`: pages hold what is of ``dtype`` in 8 bits; "auto": as it
            is.

    Raises:
        ValueError: no layers, a page count below 1, a page size that is not a power of two, or a
            format that is not known, or not on this device.
        MemoryError: the pages do not fit; says how many were asked for and their size.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        num_pages: int,
        page_size: int = 16,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        devices: Sequence[torch.device] = (),
        kv_cache_dtype: str = "auto",
    ) -> None:
        check_page_format(kv_cache_dtype, torch.device(device))
        if not shapes:
            raise ValueError("shapes is empty: a cache needs at least one layer")
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, must be at least 1")
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"page_size is {page_size}, must be a power of two")
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.device(device)
        stored, scale_bytes = PAGE_FORMATS.get(kv_cache_dtype, PageFormat(dtype, 0))
        per_layer = [2 * heads * (dim + scale_bytes) * stored.itemsize for heads, dim in shapes]
        self.bytes_per_token: int = sum(per_layer)
        self.nbytes: int = self.bytes_per_token * page_size * num_pages

        places = list(devices) or [self.device] * len(shapes)
        alike: dict[tuple[int, int, torch.device], list[int]] = {}
        for layer, ((heads, dim), place) in enumerate(zip(shapes, places, strict=True)):
            alike.setdefault((heads, dim, place), []).append(layer)
        self._check_memory()
        pools: list[Pool] = []
        try:
            for (heads, dim, place), layers in alike.items():
                size = (len(layers), num_pages, page_size, heads, dim + scale_bytes)
                k, v = (torch.empty(size, dtype=stored, device=place) for _ in range(2))
                for part in (k, v):
                    if part.is_cpu:
                        advise_large_pages(part)  # before the first write, which takes the pages
                    part.zero_()
                pools.append(Pool(tuple(layers), k, v))
        except (RuntimeError, MemoryError) as error:
            raise MemoryError(self._does_not_fit("the allocation failed")) from error
        self.pools: tuple[Pool, ...] = tuple(pools)

        # Views per layer, made once: the attention hook runs per layer and step.
        views = {
            layer: (pool.k[index], pool.v[index])
            for pool in pools
            for index, layer in enumerate(pool.layers)
        }
        self.pages = tuple(views[layer] for layer in range(len(shapes)))

    @property
    def num_layers(self) -> int:
        return len(self.pages)

    def compact(
        self,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        accepted_nodes: torch.Tensor,
        num_accepted: torch.Tensor,
    ) -> None:
        """Moves accepted nodes to the front: slot seq_len + nodes[j] to seq_len + j, all layers.

        Args:
            block_table: [B, MP] i32. seq_lens: [B] i32, before the step is committed.
            accepted_nodes: [B, S] i32, increasing, the root (0) first.
            num_accepted: [B] i32, entries of each row that count.
        """
        moves = (block_table, seq_lens, accepted_nodes, num_accepted)
        for pool in self.pools:
            kv_compact(pool.k, pool.v, *_beside(pool, moves))

    def copy_pages(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies page src[i] to page dst[i] ([M] i32 each) in all layers."""
        for pool in self.pools:
            kv_copy_pages(pool.k, pool.v, *_beside(pool, (src, dst)))

    def _check_memory(self) -> None:
        # Linux overcommits: without this a too large cache dies later, killed, without a message.
        if self.device.type == "cpu":
            available = _available_memory_bytes()
            if available is not None and self.nbytes > available:
                raise MemoryError(self._does_not_fit(f"{available / 2**20:.0f} MB are available"))

    def _does_not_fit(self, why: str) -> str:
        return (
            f"{self.num_pages} KV pages of {self.page_size} tokens need "
            f"{self.nbytes / 2**20:.0f} MB on {self.device} ({self.bytes_per_token} bytes per "
            f"token) and {why}; "
            "lower the number of pages, the batch size or the maximum length"
        )


def check_page_format(name: str, device: torch.device) -> None:
    """Raises ValueError where pages cannot be of this format."""
    if name == "auto":
        return
    if not isinstance(name, str) or name not in PAGE_FORMATS:
        raise ValueError(
            f"kv_cache_dtype is {name!r}; it must be auto, {' or '.join(PAGE_FORMATS)}"
        )
    if device.type != "cpu":
        raise ValueError(
            f"kv_cache_dtype is {name!r}, which the CPU's kernels read, and the model is on "
            f"{device}; leave it out, or set device to 'cpu'"
        )


def _beside(pool: Pool, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors on the pool's device."""
    return [tensor.to(pool.k.device, non_blocking=True) for tensor in tensors]


def _available_memory_bytes() -> int | None:
    """Memory that can be had without swapping, where the system says so (Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
