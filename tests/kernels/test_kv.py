"""The KV ops against their references: page edges, ragged rows, in-place moves, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.isas import ISAS
from helpers.kv_cases import BITS_8, block_table, pages_of
from inferlab import _C
from inferlab.kernels import (
    advise_large_pages,
    kv_append,
    kv_compact,
    kv_copy_pages,
    kv_gather,
    reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MOVED = [*DTYPES, *BITS_8.values()]
SHAPES = {
    "seed": st.integers(0, 2**31),
    "lens": st.lists(st.sampled_from([0, 1, 15, 16, 17, 63, 111]), min_size=1, max_size=4),
    "heads": st.sampled_from([1, 2, 3]),
    "dim": st.sampled_from([1, 8, 40, 64, 129]),
    "page_size": st.sampled_from([1, 2, 16, 64]),
    "dtype": st.sampled_from(DTYPES),
    "isa": st.sampled_from(ISAS),
    "threads": st.sampled_from([1, 2]),
}
MOVES = {**SHAPES, "dtype": st.sampled_from(MOVED)}


@pytest.fixture(autouse=True)
def restore_native_settings():
    yield
    _C.force_isa("auto")
    _C.set_num_threads(0)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def random_pool(layers, table, page_size, heads, dim, dtype, generator):
    """K and V caches of `layers` layers, every slot filled."""
    pages = max(int(table.max()) + 1, 1)
    shape = (layers, pages, page_size, heads, dim)
    if dtype in BITS_8.values():
        return [torch.randint(100, shape, dtype=dtype, generator=generator) for _ in range(2)]
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def assert_same(native, expected):
    for a, b in zip(native, expected, strict=True):
        assert torch.equal(a, b)


# ---- kv_append -----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    nodes=st.sampled_from([1, 2, 7, 33]),
    node_offset=st.sampled_from([0, 3]),
    ragged=st.booleans(),
    transposed=st.booleans(),
    **SHAPES,
)
def test_append(
    seed, lens, heads, dim, page_size, dtype, isa, threads, nodes, node_offset, ragged, transposed
):
    _C.force_isa(isa)
    _C.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    table = block_table([n + node_offset + nodes for n in lens], page_size, g)
    pools = random_pool(1, table, page_size, heads, dim, dtype, g)
    shape = (len(lens), heads, nodes, dim) if transposed else (len(lens), nodes, heads, dim)
    k, v = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    if transposed:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    counts = torch.randint(nodes + 1, (len(lens),), generator=g).int() if ragged else None
    expected = [p.clone() for p in pools]
    options = {"node_offset": node_offset, "num_nodes": counts}
    kv_append(k, v, pools[0][0], pools[1][0], table, i32(*lens), **options)
    reference.kv_append(k, v, expected[0][0], expected[1][0], table, i32(*lens), **options)
    assert_same(pools, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_append_of_a_large_prompt_streams(isa):
    _C.force_isa(isa)
    g = torch.Generator().manual_seed(0)
    table = block_table([3000], 16, g)
    pools = random_pool(1, table, 16, 4, 72, torch.float32, g)
    k, v = (torch.randn(1, 2995, 4, 72, generator=g) for _ in range(2))
    expected = [p.clone() for p in pools]
    kv_append(k, v, pools[0][0], pools[1][0], table, i32(5))
    reference.kv_append(k, v, expected[0][0], expected[1][0], table, i32(5))
    assert_same(pools, expected)


@settings(max_examples=80, deadline=None)
@given(
    stored=st.sampled_from(list(BITS_8)),
    nodes=st.sampled_from([1, 2, 7, 33]),
    spread=st.sampled_from([1e-36, 1e-3, 1.0, 300.0, 1e4, 1e30]),
    transposed=st.booleans(),
    **SHAPES,
)
def test_append_rounds_to_8_bits(
    seed, lens, heads, dim, page_size, dtype, isa, threads, stored, nodes, spread, transposed
):
    """With heads that hold nothing but zeros, numbers that are not finite, and the largest."""
    _C.force_isa(isa)
    _C.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    table = block_table([n + nodes for n in lens], page_size, g)
    shape = (len(lens), heads, nodes, dim) if transposed else (len(lens), nodes, heads, dim)
    k, v = (torch.randn(shape, generator=g).mul(spread).to(dtype) for _ in range(2))
    k[0, 0, 0] = 0
    v[-1, -1, -1, -1] = [float("nan"), float("inf"), -448.0, 2.0**-9][seed % 4]
    if transposed:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    blank = random_pool(1, table, page_size, heads, dim, dtype, g)[0][0]
    pages = [pages_of(blank, stored) for _ in range(4)]
    kv_append(k, v, *pages[:2], table, i32(*lens))
    reference.kv_append(k, v, *pages[2:], table, i32(*lens))
    for got, expected in zip(pages[:2], pages[2:], strict=True):
        numbers, wanted = (reference.kv.as_numbers(x) for x in (got, expected))
        torch.testing.assert_close(numbers, wanted, rtol=0, atol=0, equal_nan=True)


# ---- kv_compact ----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(nodes=st.sampled_from([1, 2, 9, 70]), layers=st.sampled_from([1, 3]), **MOVES)
def test_compact(seed, lens, heads, dim, page_size, dtype, isa, threads, nodes, layers):
    _C.force_isa(isa)
    _C.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    table = block_table([n + nodes for n in lens], page_size, g)
    pools = random_pool(layers, table, page_size, heads, dim, dtype, g)
    accepted = torch.full((len(lens), nodes), -1, dtype=torch.int32)
    counts = torch.randint(nodes + 1, (len(lens),), generator=g).int()
    for b, count in enumerate(counts.tolist()):
        accepted[b, :count] = torch.randperm(nodes, generator=g)[:count].sort().values.int()
    expected = [p.clone() for p in pools]
    kv_compact(*pools, table, i32(*lens), accepted, counts)
    reference.kv_compact(*expected, table, i32(*lens), accepted, counts)
    assert_same(pools, expected)


def test_compact_moves_across_a_page_edge():
    """Sequence length 14, pages of 16: nodes 1 and 5 stand on either side of the edge."""
    table = i32(2, 0)[None]
    k = torch.arange(3 * 16.0).reshape(1, 3, 16, 1, 1)
    v = -k.clone()
    before = k.clone()
    kv_compact(k, v, table, i32(14), i32(0, 3, 5)[None], i32(3))
    assert k[0, 2, 15].item() == before[0, 0, 1].item()  # slot 14 + 3 -> slot 15, last of page 2
    assert k[0, 0, 0].item() == before[0, 0, 3].item()  # slot 14 + 5 -> slot 16, first of page 0
    assert torch.equal(v, -k)
    changed = (k != before).flatten().nonzero().flatten().tolist()
    assert changed == [0, 2 * 16 + 15]


def test_compact_of_a_straight_path_touches_nothing():
    pool = torch.randn(2, 2, 4, 1, 8)
    before = pool.clone()
    kv_compact(pool, pool.clone(), i32(0, 1)[None], i32(3), i32(0, 1, 2, -1)[None], i32(3))
    assert torch.equal(pool, before)


# ---- kv_gather -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(slack=st.sampled_from([0, 1, 40]), **MOVES)
def test_gather(seed, lens, heads, dim, page_size, dtype, isa, threads, slack):
    _C.force_isa(isa)
    _C.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    table = block_table([max(n, 1) for n in lens], page_size, g)
    pages = random_pool(1, table, page_size, heads, dim, dtype, g)[0][0]
    mark = float("nan") if dtype in DTYPES else 101
    for b, n in enumerate(lens):  # what lies behind a sequence must not come along
        for slot in range(n, table.shape[1] * page_size):
            if table[b, slot // page_size] >= 0:
                pages[table[b, slot // page_size], slot % page_size] = mark
    out = kv_gather(pages, table, i32(*lens), max(lens) + slack)
    assert torch.equal(out, reference.kv_gather(pages, table, i32(*lens), max(lens) + slack))
    assert out.isfinite().all()
    assert (out != mark).all()
    into = torch.full_like(out, 3.0)
    assert kv_gather(pages, table, i32(*lens), max(lens) + slack, out=into) is into
    assert torch.equal(into, out)


@pytest.mark.parametrize("isa", ISAS)
def test_append_then_gather_gives_back(isa):
    _C.force_isa(isa)
    g = torch.Generator().manual_seed(1)
    table = block_table([2500, 1700], 16, g)
    k_pages, v_pages = (p[0] for p in random_pool(1, table, 16, 4, 96, torch.bfloat16, g))
    k, v = (torch.randn(2, 2500, 4, 96, generator=g).bfloat16() for _ in range(2))
    counts = i32(2500, 1700)
    kv_append(k, v, k_pages, v_pages, table, i32(0, 0), num_nodes=counts)
    for rows, pages in ((k, k_pages), (v, v_pages)):
        dense = kv_gather(pages, table, counts, 2500)
        assert torch.equal(dense[0], rows[0])
        assert torch.equal(dense[1, :1700], rows[1, :1700])
        assert not dense[1, 1700:].any()


# ---- kv_copy_pages -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(moves=st.sampled_from([0, 1, 5]), layers=st.sampled_from([1, 3]), **MOVES)
def test_copy_pages(seed, lens, heads, dim, page_size, dtype, isa, threads, moves, layers):
    _C.force_isa(isa)
    _C.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    pools = random_pool(layers, i32(11), page_size, heads, dim, dtype, g)
    ids = torch.randperm(12, generator=g).int()
    src, dst = ids[:moves], ids[6 : 6 + moves]
    if moves > 1:
        src = src.clone()
        src[1] = src[0]  # one page may be copied twice
    expected = [p.clone() for p in pools]
    kv_copy_pages(*pools, src, dst)
    reference.kv_copy_pages(*expected, src, dst)
    assert_same(pools, expected)


# ---- broken variants are caught by the same comparison -------------------------------------------


def compact_off_by_one_page(k, v, table, lens, accepted, counts):
    reference.kv_compact(k, v, table.roll(1, dims=1), lens, accepted, counts)


def compact_that_forgets_values(k, v, table, lens, accepted, counts):
    reference.kv_compact(k, v.clone(), table, lens, accepted, counts)


def compact_descending(k, v, table, lens, accepted, counts):
    for j in reversed(range(accepted.shape[1])):
        only = torch.where(counts > j, j, 0)
        nodes = torch.arange(accepted.shape[1]).int().expand_as(accepted).clone()
        nodes[:, j] = torch.where(only == j, accepted[:, j], j)
        reference.kv_compact(k, v, table, lens, nodes, counts)


@pytest.mark.parametrize(
    "variant",
    [compact_off_by_one_page, compact_that_forgets_values, compact_descending],
    ids=lambda f: f.__name__,
)
def test_broken_variants_are_caught(variant):
    g = torch.Generator().manual_seed(2)
    table = block_table([22, 9], 4, g)
    pools = random_pool(2, table, 4, 2, 8, torch.float32, g)
    accepted = i32(0, 2, 3, 4, 0, 0, 0, 0).reshape(2, 4)
    broken = [p.clone() for p in pools]
    arguments = (table, i32(14, 1), accepted, i32(4, 1))
    kv_compact(*pools, *arguments)
    variant(*broken, *arguments)
    with pytest.raises(AssertionError):
        assert_same(broken, pools)


# ---- refusals ------------------------------------------------------------------------------------


def append_arguments():
    return {
        "k": torch.zeros(2, 3, 1, 8),
        "v": torch.zeros(2, 3, 1, 8),
        "k_pages": torch.zeros(4, 4, 1, 8),
        "v_pages": torch.zeros(4, 4, 1, 8),
        "block_table": i32(0, 1, 2, 3).reshape(2, 2),
        "seq_lens": i32(4, 0),
    }


BAD_APPEND = [
    (ValueError, "block_table has 2 pages", {"seq_lens": i32(4, 6)}),
    (ValueError, r"block_table\[0, 1\] is 4", {"block_table": i32(0, 4, 2, 3).reshape(2, 2)}),
    (ValueError, r"block_table\[1, 0\] is -1", {"block_table": i32(0, 1, -1, 3).reshape(2, 2)}),
    (ValueError, r"seq_lens\[0\] is -4", {"seq_lens": i32(-4, 0)}),
    (ValueError, "node_offset is -1", {"node_offset": -1}),
    (ValueError, r"num_nodes\[1\] is -1", {"num_nodes": i32(0, -1)}),
    (ValueError, r"num_nodes\[1\] is 4", {"num_nodes": i32(0, 4)}),
    (ValueError, "k has shape", {"k": torch.zeros(2, 3, 2, 8)}),
    (ValueError, "v has shape", {"v": torch.zeros(2, 2, 1, 8)}),
    (TypeError, "v has dtype bfloat16", {"v": torch.zeros(2, 3, 1, 8).bfloat16()}),
    (ValueError, "v_pages has shape", {"v_pages": torch.zeros(3, 4, 1, 8)}),
    (ValueError, "k_pages must be contiguous", {"k_pages": torch.zeros(4, 8, 1, 8)[:, ::2]}),
    (ValueError, "page size 3", dict.fromkeys(("k_pages", "v_pages"), torch.zeros(4, 3, 1, 8))),
]


@pytest.mark.parametrize(("error", "message", "changes"), BAD_APPEND)
def test_append_refuses(error, message, changes):
    arguments = append_arguments() | changes
    with pytest.raises(error, match=message):
        kv_append(**arguments)
    assert not arguments["k_pages"].any()


@pytest.mark.parametrize(
    ("message", "accepted", "count", "length"),
    [
        (r"accepted_nodes\[0, 2\] is 2 after 2", [0, 2, 2], 3, 0),
        (r"accepted_nodes\[0, 0\] is -1 after -1", [-1, 2, 3], 3, 0),
        (r"num_accepted\[0\] is 4", [0, 1, 2], 4, 0),
        (r"num_accepted\[0\] is -1", [0, 1, 2], -1, 0),
        ("slot 8 of sequence 0", [0, 1, 8], 3, 0),
        (r"seq_lens\[0\] is -1", [0, 1, 2], 3, -1),
    ],
)
def test_compact_refuses(message, accepted, count, length):
    k = torch.randn(2, 2, 4, 1, 8)
    before = k.clone()
    with pytest.raises(ValueError, match=message):
        kv_compact(k, k.clone(), i32(0, 1)[None], i32(length), i32(*accepted)[None], i32(count))
    assert torch.equal(k, before)


@pytest.mark.parametrize(
    ("message", "src", "dst"),
    [
        (r"src\[0\] is 4", [4], [0]),
        (r"dst\[0\] is -1", [0], [-1]),
        ("dst has page 2 twice", [0, 1], [2, 2]),
        (r"src\[1\] is page 2, which is in dst", [0, 2], [2, 3]),
        ("dst has shape", [0, 1], [2]),
    ],
)
def test_copy_pages_refuses(message, src, dst):
    k = torch.zeros(1, 4, 4, 1, 8)
    with pytest.raises(ValueError, match=message):
        kv_copy_pages(k, k.clone(), i32(*src), i32(*dst))


def test_gather_refuses():
    pages = torch.zeros(2, 4, 1, 8)
    with pytest.raises(ValueError, match=r"seq_lens\[0\] is 5; it must be at most max_len, 4"):
        kv_gather(pages, i32(0, 1)[None], i32(5), 4)
    with pytest.raises(ValueError, match="block_table has 1 pages"):
        kv_gather(pages, i32(0)[None], i32(5), 8)


# ---- frameworks ----------------------------------------------------------------------------------


def test_numpy():
    k_pages, v_pages = (np.zeros((3, 4, 2, 8), np.float16) for _ in range(2))
    rows = np.random.default_rng(0).standard_normal((1, 6, 2, 8)).astype(np.float16)
    table, lens = np.array([[2, 0]], np.int32), np.array([1], np.int32)
    kv_append(rows, rows, k_pages, v_pages, table, lens)
    dense = kv_gather(k_pages, table, np.array([7], np.int32), 8)
    assert isinstance(dense, np.ndarray)
    assert np.array_equal(dense[:, 1:7], rows)
    path, count = np.array([[0, 5]], np.int32), np.array([2], np.int32)
    kv_compact(k_pages[None], v_pages[None], table, lens, path, count)
    assert np.array_equal(k_pages[2, 2], rows[0, 5])
    kv_copy_pages(k_pages[None], v_pages[None], np.array([2], np.int32), np.array([1], np.int32))
    assert np.array_equal(v_pages[1], v_pages[2])


def test_compiles_whole():
    """Mutating ops inside a compiled graph: the caches change as they do in eager mode."""
    table, lens = i32(0, 1)[None], i32(2)

    def f(k, cache_k, cache_v):
        kv_append(k * 2, k, cache_k[0], cache_v[0], table, lens)
        kv_compact(cache_k, cache_v, table, lens, i32(0, 3)[None], i32(2))
        kv_copy_pages(cache_k, cache_v, i32(1), i32(2))
        return kv_gather(cache_k[0], table, lens + 2, 8) + 1

    k = torch.randn(1, 4, 1, 8)
    caches = [torch.zeros(1, 3, 4, 1, 8) for _ in range(4)]
    expected = f(k, *caches[:2])
    actual = torch.compile(f, fullgraph=True, backend="aot_eager")(k, *caches[2:])
    assert torch.equal(actual, expected)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


def test_large_pages_change_no_value():
    small, pool = torch.ones(8), torch.arange(1 << 20, dtype=torch.float32)
    assert advise_large_pages(small) is False
    assert advise_large_pages(pool) in (True, False)
    assert torch.equal(pool, torch.arange(1 << 20, dtype=torch.float32))
    with pytest.raises(ValueError, match="data"):
        advise_large_pages(pool[::2])
