"""Offsets past 2^31 and 2^32, in bytes, in elements and, on the shim, in 16-byte words.

Caches of 64 GB (16 GB on a GPU) of which only the first and the last pages are used.
"""

import pytest
import torch

from helpers import lazy
from inferlab.kernels import (
    kv_append,
    kv_compact,
    kv_copy_pages,
    kv_gather,
    paged_tree_attention,
    reference,
)

PAGE_SIZE, HEADS, DIM = 16, 2, 64
DTYPE = torch.bfloat16
PAGE_BYTES = PAGE_SIZE * HEADS * DIM * DTYPE.itemsize


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


@pytest.fixture
def pages(backend):
    return (2**36 if backend.device == "cpu" else 2**34) // PAGE_BYTES + 5


def pool(backend, *leading):
    return lazy.zeros(backend, (*leading, PAGE_SIZE, HEADS, DIM), DTYPE)


def test_append_and_gather(backend, pages):
    k_pages, v_pages = pool(backend, pages), pool(backend, pages)
    table = i32(3, pages - 2, pages - 1)[None]
    k, v = random(1, 30, HEADS, DIM), random(1, 30, HEADS, DIM, seed=1)
    arguments = [backend.to(t) for t in (table, i32(10))]
    with backend.active():
        kv_append(backend.to(k), backend.to(v), k_pages, v_pages, *arguments)
        got = kv_gather(k_pages, arguments[0], backend.to(i32(40)), 40).cpu()
    assert torch.equal(got[0, 10:], k[0])
    assert not got[0, :10].any()
    assert torch.equal(v_pages[pages - 2].cpu(), v[0, 6:22])
    assert torch.equal(v_pages[pages - 1, :8].cpu(), v[0, 22:])


def test_compact(backend, pages):
    """The last of two layers, on the last pages."""
    caches = [pool(backend, 2, pages // 2) for _ in range(2)]
    last = pages // 2 - 1
    small = [random(1, 3, PAGE_SIZE, HEADS, DIM, seed=s) for s in range(2)]
    for cache, rows in zip(caches, small, strict=True):
        cache[1, last - 2 :] = rows[0].to(cache.device)
    path = i32(0, 3, 9, 20)[None], i32(4)
    table = i32(last - 2, last, last - 1)[None]
    with backend.active():
        kv_compact(*caches, *map(backend.to, (table, i32(13), *path)))
    reference.kv_compact(*small, i32(0, 2, 1)[None], i32(13), *path)
    for cache, rows in zip(caches, small, strict=True):
        assert torch.equal(cache[1, last - 2 :].cpu(), rows[0])


def test_copy_pages(backend, pages):
    caches = [pool(backend, 2, pages // 2) for _ in range(2)]
    last = pages // 2 - 1
    rows = [random(2, PAGE_SIZE, HEADS, DIM, seed=s) for s in range(2)]
    for cache, page in zip(caches, rows, strict=True):
        cache[1, 0], cache[1, last] = page.to(cache.device)
    with backend.active():
        kv_copy_pages(*caches, *map(backend.to, (i32(0, last), i32(last - 1, 2))))
    for cache, page in zip(caches, rows, strict=True):
        assert torch.equal(cache[1, last - 1].cpu(), page[0])
        assert torch.equal(cache[1, 2].cpu(), page[1])


def test_attention(backend, pages):
    k_pages, v_pages = pool(backend, pages), pool(backend, pages)
    small = [random(3, PAGE_SIZE, HEADS, DIM, seed=s) for s in range(2)]
    for cache, rows in zip((k_pages, v_pages), small, strict=True):
        cache[pages - 3 :] = rows.to(cache.device)
    q, lens = random(1, 4, 2 * HEADS, DIM, seed=2), i32(41)
    with backend.active():
        arguments = map(backend.to, (i32(pages - 2, pages - 1, pages - 3)[None], lens))
        moved = (backend.to(q), k_pages, v_pages, *arguments)
        got = paged_tree_attention(*moved, None, scale=DIM**-0.5).cpu()
    moved = (q, *small, i32(1, 2, 0)[None], lens)
    expected = reference.paged_tree_attention(*moved, None, scale=DIM**-0.5)
    torch.testing.assert_close(got, expected, rtol=1.6e-2, atol=1.6e-2)
