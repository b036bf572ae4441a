"""The KV ops on accelerators, against the reference: bit for bit, since they only move memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.backends import random_examples
from helpers.kv_cases import block_table
from inferlab.kernels import kv_append, kv_compact, kv_copy_pages, kv_gather, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "seed": st.integers(0, 2**31),
    "lens": st.lists(st.sampled_from([0, 1, 15, 16, 17, 63]), min_size=1, max_size=3),
    "heads": st.sampled_from([1, 2, 3]),
    "dim": st.sampled_from([1, 8, 40, 129]),
    "page_size": st.sampled_from([1, 2, 16, 64]),
    "dtype": st.sampled_from(DTYPES),
}


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def random_pool(layers, table, page_size, heads, dim, dtype, generator):
    shape = (layers, max(int(table.max()) + 1, 1), page_size, heads, dim)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def random_paths(batch, nodes, generator):
    """accepted_nodes [B, nodes] (-1 behind the path) and num_accepted [B]."""
    accepted = torch.full((batch, nodes), -1, dtype=torch.int32)
    counts = torch.randint(nodes + 1, (batch,), generator=generator).int()
    for b, count in enumerate(counts.tolist()):
        accepted[b, :count] = torch.randperm(nodes, generator=generator)[:count].sort().values.int()
    return accepted, counts


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# ---- kv_append -----------------------------------------------------------------------------------


@random_examples(25)
@given(
    nodes=st.sampled_from([1, 2, 7, 33]),
    node_offset=st.sampled_from([0, 3]),
    ragged=st.booleans(),
    transposed=st.booleans(),
    **SHAPES,
)
def test_append(
    backend, seed, lens, heads, dim, page_size, dtype, nodes, node_offset, ragged, transposed
):
    g = torch.Generator().manual_seed(seed)
    table = block_table([n + node_offset + nodes for n in lens], page_size, g)
    pools = [p[0] for p in random_pool(1, table, page_size, heads, dim, dtype, g)]
    shape = (len(lens), heads, nodes, dim) if transposed else (len(lens), nodes, heads, dim)
    k, v = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    if transposed:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    counts = torch.randint(nodes + 1, (len(lens),), generator=g).int() if ragged else None
    options = {"node_offset": node_offset, "num_nodes": counts}
    got = backend.call_in_place(kv_append, k, v, *pools, table, i32(*lens), **options)
    reference.kv_append(k, v, *pools, table, i32(*lens), **options)
    assert_same(got[2:4], pools)


def test_append_skips_slots_that_do_not_exist(backend):
    """Sequence 0 runs off its table, 1 onto pages that are not there, 2 starts below 0."""
    table = i32(0, 1, 2, 9, -1, 3).reshape(3, 2)
    k = torch.randn(3, 8, 2, 8)
    pools = [torch.randn(4, 4, 2, 8) for _ in range(2)]
    got = backend.call_in_place(kv_append, k, k, *pools, table, i32(5, 1, -2))
    for before, after in zip(pools, got[2:4], strict=True):
        expected = before.clone()
        expected[1, 1:] = k[0, :3]
        expected[2, 1:] = k[1, :3]
        expected[3, :2] = k[2, 6:]
        assert torch.equal(after, expected)


# ---- kv_compact ----------------------------------------------------------------------------------


@random_examples(25)
@given(nodes=st.sampled_from([1, 2, 9, 70]), layers=st.sampled_from([1, 3]), **SHAPES)
def test_compact(backend, seed, lens, heads, dim, page_size, dtype, nodes, layers):
    g = torch.Generator().manual_seed(seed)
    table = block_table([n + nodes for n in lens], page_size, g)
    pools = random_pool(layers, table, page_size, heads, dim, dtype, g)
    path = random_paths(len(lens), nodes, g)
    got = backend.call_in_place(kv_compact, *pools, table, i32(*lens), *path)
    reference.kv_compact(*pools, table, i32(*lens), *path)
    assert_same(got[:2], pools)


def test_compact_of_a_path_longer_than_a_block_of_threads(backend):
    g = torch.Generator().manual_seed(3)
    table = block_table([5 + 700], 16, g)
    pools = random_pool(2, table, 16, 1, 8, torch.float32, g)
    accepted = torch.randperm(700, generator=g)[:600].sort().values.int()[None]
    got = backend.call_in_place(kv_compact, *pools, table, i32(5), accepted, i32(600))
    reference.kv_compact(*pools, table, i32(5), accepted, i32(600))
    assert_same(got[:2], pools)


def test_compact_moves_across_a_page_edge(backend):
    """Sequence length 14, pages of 16: nodes 1 and 5 stand on either side of the edge."""
    table = i32(2, 0)[None]
    k = torch.arange(3 * 16.0).reshape(1, 3, 16, 1, 1)
    got = backend.call_in_place(kv_compact, k, -k, table, i32(14), i32(0, 3, 5)[None], i32(3))
    expected = k.clone()
    expected[0, 2, 15] = k[0, 0, 1]  # slot 14 + 3 -> slot 15, last of page 2
    expected[0, 0, 0] = k[0, 0, 3]  # slot 14 + 5 -> slot 16, first of page 0
    assert_same(got[:2], [expected, -expected])


def test_compact_of_a_straight_path_touches_nothing(backend):
    pool = torch.randn(2, 2, 4, 1, 8)
    path = i32(0, 1, 2, -1)[None], i32(3)
    got = backend.call_in_place(kv_compact, pool, -pool, i32(0, 1)[None], i32(3), *path)
    assert_same(got[:2], [pool, -pool])


def test_compact_skips_rows_that_do_not_exist(backend):
    """Nodes off the table, on a page that is not there, below their step; a count past the end."""
    pool = torch.randn(2, 4, 4, 1, 8)
    table = i32(0, 1, 2, 9, 3, -1).reshape(3, 2)
    accepted = i32(3, 90, -1, 0, 2, 5, 1, 0, -7).reshape(3, 3)
    got = backend.call_in_place(
        kv_compact, pool, -pool, table, i32(1, 1, 2), accepted, i32(2, 3, 9)
    )
    expected = pool.clone()
    expected[:, 0, 1] = pool[:, 1, 0]  # sequence 0: slot 1 + 3 -> slot 1
    expected[:, 2, 2] = pool[:, 2, 3]  # sequence 1: slot 1 + 2 -> slot 2; slot 1 + 5 is on page 9
    expected[:, 3, 2] = pool[:, 3, 3]  # sequence 2: slot 2 + 1 -> slot 2
    assert_same(got[:2], [expected, -expected])


# ---- kv_gather -----------------------------------------------------------------------------------


@random_examples(25)
@given(slack=st.sampled_from([0, 1, 40]), **SHAPES)
def test_gather(backend, seed, lens, heads, dim, page_size, dtype, slack):
    g = torch.Generator().manual_seed(seed)
    table = block_table([max(n, 1) for n in lens], page_size, g)
    pages = random_pool(1, table, page_size, heads, dim, dtype, g)[0][0]
    for b, n in enumerate(lens):  # what lies behind a sequence must not come along
        for slot in range(n, table.shape[1] * page_size):
            if table[b, slot // page_size] >= 0:
                pages[table[b, slot // page_size], slot % page_size] = float("nan")
    arguments = (pages, table, i32(*lens), max(lens) + slack)
    got = backend.call(kv_gather, *arguments)
    assert torch.equal(got, reference.kv_gather(*arguments))


def test_gather_gives_zeros_for_slots_that_do_not_exist(backend):
    pages = torch.randn(4, 4, 2, 8)
    table = i32(0, 1, 9, 2, -1, 3).reshape(3, 2)
    got = backend.call(kv_gather, pages, table, i32(99, 7, -5), 10)
    expected = torch.zeros(3, 10, 2, 8)
    expected[0, :8] = pages[:2].flatten(0, 1)
    expected[1, 4:7] = pages[2, :3]
    assert torch.equal(got, expected)


# ---- kv_copy_pages -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 64])
def test_copy_pages(backend, dtype, dim):
    k, v = (torch.randn(3, 9, 16, 2, dim).to(dtype) for _ in range(2))
    ids = torch.randperm(9).int()
    src, dst = ids[:4], ids[4:8]
    got = backend.call_in_place(kv_copy_pages, k, v, src, dst)
    reference.kv_copy_pages(k, v, src, dst)
    assert_same(got[:2], [k, v])


def test_copy_pages_skips_pages_that_do_not_exist(backend):
    k = torch.randn(2, 4, 16, 2, 8)
    src, dst = i32(0, 9, -1), i32(-3, 1, 2)
    got = backend.call_in_place(kv_copy_pages, k, k.clone(), src, dst)
    assert torch.equal(got[0], k)
