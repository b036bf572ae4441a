"""paged_tree_attention against the float64 reference, and what a row's bits may depend on."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.isas import ISAS
from helpers.kv_cases import (
    BITS_8,
    ancestor_words,
    attention_case,
    pages_of,
    path_of,
    random_parents,
)
from inferlab import _C
from inferlab.kernels import paged_tree_attention, reference
from inferlab.kernels.reference.attention import visible_slots
from inferlab.kernels.reference.kv import gather_slots

# fp32 accumulates up to some hundred terms; 16-bit results are rounded once, to 8 or 11 bits.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def restore_native_settings():
    yield
    _C.force_isa("auto")
    _C.set_num_threads(0)


def check(op, case):
    expected = case.run(reference.paged_tree_attention, compute_dtype=torch.float64)
    actual = case.run(op)
    assert actual.shape == case.q.shape
    assert actual.dtype == case.q.dtype
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lens=st.lists(
        st.sampled_from([0, 1, 15, 16, 19, 111, 255, 256, 257, 300]), min_size=1, max_size=3
    ),
    nodes=st.sampled_from([1, 2, 5, 17, 33, 65]),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    dim=st.sampled_from([8, 32, 40, 64, 80, 96, 128, 256]),
    page_size=st.sampled_from([1, 2, 16, 64]),
    dtype=st.sampled_from(list(TOLERANCE)),
    stored=st.sampled_from([None, None, *BITS_8]),
    tree=st.booleans(),
    ragged=st.booleans(),
    node_offset=st.sampled_from([0, 0, 3]),
    window=st.sampled_from([0, 0, 1, 7, 64, 257]),
    softcap=st.sampled_from([0.0, 0.0, 2.0]),
    isa=st.sampled_from(ISAS),
    threads=st.sampled_from([1, 2]),
)
def test_matches_the_reference(seed, lens, nodes, isa, threads, **shape):
    _C.force_isa(isa)
    _C.set_num_threads(threads)
    check(paged_tree_attention, attention_case(seed, lens, nodes, **shape))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("lens", "nodes", "options"),
    [
        ([1500, 3, 2047], 3, {}),  # more than one split
        ([2300], 5, {"window": 1100}),  # the window starts inside a split
        ([700], 256, {"dim": 32}),  # the largest tree
        ([40], 300, {"tree": False, "dim": 32}),  # a prompt behind a cached prefix
        ([0], 530, {"tree": False, "kv_heads": 1, "dim": 32}),
        ([0, 90], 40, {"tree": False, "kv_heads": 1, "group": 71, "dim": 32}),  # as Falcon has it
        ([3000], 1, {"kv_heads": 8, "group": 1, "dtype": torch.bfloat16}),
        ([1500, 3, 2047], 3, {"stored": "int8", "dtype": torch.bfloat16}),
        ([700], 256, {"dim": 32, "stored": "int8"}),
        ([700], 256, {"dim": 32, "stored": "fp8"}),
    ],
)
def test_long_and_large(lens, nodes, options, isa):
    _C.force_isa(isa)
    _C.set_num_threads(2)
    check(paged_tree_attention, attention_case(1, lens, nodes, **options))


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tree": False},
        {"window": 300, "softcap": 3.0},
        {"stored": "int8"},
        {"stored": "fp8", "window": 300},
    ],
)
def test_a_row_is_the_same_alone_and_in_a_batch(options, dtype, isa):
    _C.force_isa(isa)
    case = attention_case(2, [1300, 37, 250], 19, dim=40, dtype=dtype, **options)
    together = case.run(paged_tree_attention)
    tree = case.ancestors is not None
    for b in range(3):
        for n in (0, 1, 7, 18):
            row = replace(
                case,
                q=case.q[b : b + 1, n : n + 1],
                block_table=case.block_table[b : b + 1],
                seq_lens=case.seq_lens[b : b + 1],
                ancestors=case.ancestors[b : b + 1, n : n + 1].contiguous() if tree else None,
            ).with_options(node_offset=n)
            assert torch.equal(row.run(paged_tree_attention)[0, 0], together[b, n])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("lens", "nodes"), [([5000], 1), ([2100, 30], 9), ([300] * 5, 70)])
@pytest.mark.parametrize("stored", [None, *BITS_8])
def test_threads_do_not_change_the_bits(lens, nodes, stored, isa):
    _C.force_isa(isa)
    case = attention_case(3, lens, nodes, stored=stored)
    results = []
    for threads in (1, 2, 3, 8):
        _C.set_num_threads(threads)
        results.append(case.run(paged_tree_attention))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 20, 250, 255, 256, 1020])
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("stored", [None, *BITS_8])
def test_a_tree_row_is_the_same_as_plain_decoding(length, window, dtype, stored, isa):
    """The path's K/V committed and the node decoded alone: the bits are those of the tree."""
    _C.force_isa(isa)
    g = torch.Generator().manual_seed(4)
    nodes, heads, dim, page_size = 24, 2, 64, 16
    parents = random_parents(nodes, g)
    k, v, q = (torch.randn(length + nodes, heads, dim, generator=g).to(dtype) for _ in range(3))
    count = (length + nodes + page_size - 1) // page_size
    table = torch.arange(count, dtype=torch.int32)[None]

    def attend(rows, row_q, seq_len, words):
        pages = [torch.zeros(count * page_size, heads, dim, dtype=dtype) for _ in range(2)]
        pages[0][: len(rows)], pages[1][: len(rows)] = k[rows], v[rows]
        return paged_tree_attention(
            row_q,
            *(pages_of(p.view(count, page_size, heads, dim), stored) for p in pages),
            table,
            torch.tensor([seq_len], dtype=torch.int32),
            words,
            scale=0.125,
            window=window,
        )

    everything = list(range(length + nodes))
    tree = attend(everything, q[None, length:], length, ancestor_words(parents)[None])
    for node in range(nodes):
        path = [length + n for n in path_of(parents, node)]
        rows = everything[:length] + path
        plain = attend(rows, q[None, path[-1:]], len(rows) - 1, None)
        assert torch.equal(plain[0, 0], tree[0, node])


def test_torch_and_this_take_turns_with_the_tile_registers():
    case = attention_case(3, [300], 5, dtype=torch.bfloat16, kv_heads=2, group=2, dim=64)
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    product = a.bfloat16() @ b.bfloat16()
    out = case.run(paged_tree_attention)
    for _ in range(3):
        assert torch.equal(a.bfloat16() @ b.bfloat16(), product)
        assert torch.equal(case.run(paged_tree_attention), out)


def test_a_nan_in_a_sibling_stays_there():
    case = attention_case(5, [30], 2, page_size=32)
    words = ancestor_words([-1, 0, 0, 0])[None]
    q = case.q[:, :1].expand(-1, 4, -1, -1)
    case = replace(case, q=q, ancestors=words)
    page = int(case.block_table[0, 0])
    table = torch.tensor([[page, 1 - page if page < 2 else 0]], dtype=torch.int32)
    for pages in (case.k_pages, case.v_pages):
        pages.copy_(pages.nan_to_num(0.5))
        pages[table[0, 1], 0] = float("nan")  # slot 32: node 2
    out = replace(case, block_table=table).run(paged_tree_attention)
    assert out[0, [0, 1, 3]].isfinite().all()
    assert out[0, 2].isnan().all()


def test_a_nan_in_a_seen_key_is_not_lost():
    case = attention_case(6, [40], 1)
    case.k_pages[case.block_table[0, 1], 3, 0, 5] = float("nan")  # slot 19, KV head 0
    out = case.run(paged_tree_attention)
    assert out[0, 0, :2].isnan().all()
    assert out[0, 0, 2:].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_every_e4m3_is_widened_to_what_it_is(isa):
    """Of one seen key all weight goes to its value."""
    _C.force_isa(isa)
    codes = torch.arange(256, dtype=torch.uint8)
    for dim in (8, 24, 64, 256):
        for row in codes.view(-1, dim) if 256 % dim == 0 else codes[:240].view(-1, dim):
            q = torch.zeros(1, 1, 1, dim)
            keys = torch.zeros(1, 1, 1, dim, dtype=torch.uint8)
            values = row.view(1, 1, 1, dim)
            table, length = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            out = paged_tree_attention(q, keys, values, table, length, None, scale=1.0)
            expected = row.view(torch.float8_e4m3fn).float()
            torch.testing.assert_close(out[0, 0, 0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stored", list(BITS_8))
def test_pages_of_8_bits_are_the_cpus_and_both_alike(stored):
    case = attention_case(6, [40], 1, stored=stored)
    with pytest.raises(TypeError, match=r"v_pages has dtype float32; it must be that of k_pages"):
        replace(case, v_pages=case.v_pages.float()).run(paged_tree_attention)
    if stored == "int8":
        with pytest.raises(ValueError, match=r"k_pages has shape .* the 4 bytes of their scale"):
            replace(case, k_pages=case.k_pages[..., :3].contiguous()).run(paged_tree_attention)
    wider = torch.cat([case.k_pages, case.k_pages[..., :8]], -1)
    with pytest.raises(ValueError, match="q has shape"):
        replace(case, k_pages=wider, v_pages=wider).run(paged_tree_attention)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_an_infinite_value_spoils_its_channel_alone(dtype, isa):
    _C.force_isa(isa)
    case = attention_case(7, [300], 5, dtype=dtype, kv_heads=2, group=2, dim=64)
    clean = case.run(paged_tree_attention)
    case.v_pages[case.block_table[0, 1], 3, 0, 5] = float("inf")  # slot 19, KV head 0
    out = case.run(paged_tree_attention)
    assert (out[0, :, :2, 5] == float("inf")).all()
    out[0, :, :2, 5] = clean[0, :, :2, 5]
    torch.testing.assert_close(out, clean, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tree", [True, False])
def test_a_nan_behind_a_rows_window_changes_no_bit_of_it(tree, dtype, isa):
    _C.force_isa(isa)
    case = attention_case(8, [300], 4, dtype=dtype, kv_heads=2, group=2, dim=64, window=9)
    ancestors = ancestor_words([-1, 0, 1, 2])[None] if tree else None
    case = replace(case, ancestors=ancestors)
    clean = case.run(paged_tree_attention)
    page = case.block_table[0, 292 // case.k_pages.shape[1]]
    case.v_pages[page, 292 % case.k_pages.shape[1]] = float("nan")  # seen by node 0 alone
    out = case.run(paged_tree_attention)
    assert out[0, 0].isnan().all()
    assert torch.equal(out[0, 1:], clean[0, 1:])


# ---- broken variants are caught by the same check ------------------------------------------------


def page_off_by_one(q, k, v, table, lens, ancestors, **options):
    shifted = table.clone()
    shifted[:, 1:-1] = table[:, 2:]
    return paged_tree_attention(q, k, v, shifted.clamp(min=0), lens, ancestors, **options)


def dropped_mask_bit(q, k, v, table, lens, ancestors, **options):
    return paged_tree_attention(q, k, v, table, lens, ancestors & ~1, **options)


def window_off_by_one(q, k, v, table, lens, ancestors, window=0, **options):
    return paged_tree_attention(q, k, v, table, lens, ancestors, window=window + 1, **options)


def softcap_after_scale_lost(q, k, v, table, lens, ancestors, softcap=0.0, **options):
    return paged_tree_attention(q, k, v, table, lens, ancestors, **options)


def merged(q, k, v, table, lens, ancestors, *, scale, window=0, softcap=0.0, rescale, **options):
    """Chunks of 32 slots with their own maxima, merged with or without e^(m - M)."""
    seen = visible_slots(
        lens, ancestors, q.shape[1], table.shape[1] * k.shape[1], window=window, **options
    )
    keys, values = (gather_slots(x, table).nan_to_num(0.0) for x in (k, v))
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2) for x in (keys, values))
    scores = torch.einsum("bnhd,bshd->bhns", q, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    top = scores.amax(-1, keepdim=True)
    total, acc = 0.0, 0.0
    for begin in range(0, scores.shape[-1], 32):
        part = scores[..., begin : begin + 32]
        m = part.amax(-1, keepdim=True).clamp(min=-1e30)
        weight = torch.exp(part - m)
        gain = torch.exp(m - top) if rescale else 1.0
        total = total + gain * weight.sum(-1, keepdim=True)
        acc = acc + gain * torch.einsum("bhns,bshd->bhnd", weight, values[:, begin : begin + 32])
    return (acc / total).transpose(1, 2)


def merged_right(*args, **options):
    return merged(*args, rescale=True, **options)


def merged_without_rescaling(*args, **options):
    return merged(*args, rescale=False, **options)


BROKEN = [
    page_off_by_one,
    dropped_mask_bit,
    window_off_by_one,
    softcap_after_scale_lost,
    merged_without_rescaling,
]


@pytest.mark.parametrize("variant", [*BROKEN, merged_right], ids=lambda f: f.__name__)
def test_broken_variants_are_caught(variant):
    case = attention_case(7, [100, 61], 6, window=40, softcap=1.5)
    check(paged_tree_attention, case)
    if variant is merged_right:
        check(variant, case)
        return
    with pytest.raises(AssertionError):
        check(variant, case)


# ---- arguments -----------------------------------------------------------------------------------


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def narrow_heads(x):
    return x[..., :36].contiguous()


def odd_pages(x):
    return x[:, 1:].contiguous()


def far_bit(words):
    return words | torch.tensor([0, 0, 8])[None, :, None]


# What is raised, its message, and how the arguments of a good call are changed.
BAD = [
    (ValueError, "head dimension 36", dict.fromkeys(("q", "k_pages", "v_pages"), narrow_heads)),
    (ValueError, "q has 3 heads", {"q": lambda q: q[:, :, :3]}),
    (TypeError, "q has dtype float16", {"q": torch.Tensor.half}),
    (TypeError, "v_pages has dtype bfloat16", {"v_pages": torch.Tensor.bfloat16}),
    (TypeError, "dtype float64", dict.fromkeys(("q", "k_pages", "v_pages"), torch.Tensor.double)),
    (ValueError, "v_pages has shape", {"v_pages": lambda v: v[1:]}),
    (ValueError, "k_pages must be contiguous", {"k_pages": lambda k: k[:, ::2]}),
    (ValueError, "page size 15", dict.fromkeys(("k_pages", "v_pages"), odd_pages)),
    (TypeError, "block_table must be a tensor", {"block_table": lambda t: None}),
    (TypeError, "block_table has dtype int64", {"block_table": torch.Tensor.long}),
    (ValueError, r"block_table\[1, 2\] is -1", {"block_table": lambda t: t[:, [0, 1, 3, 2]]}),
    (ValueError, r"block_table\[0, 0\] is 99", {"block_table": lambda t: t.fill_(99)}),
    (ValueError, "block_table has 2 pages", {"block_table": lambda t: t[:, :2]}),
    (ValueError, r"seq_lens\[1\] is -1", {"seq_lens": lambda s: i32(20, -1)}),
    (ValueError, "seq_lens has shape", {"seq_lens": lambda s: s[:1]}),
    (ValueError, "ancestors has shape", {"ancestors": lambda a: a[:, :2]}),
    (ValueError, r"ancestors\[0, 2\] has a bit at or above 3", {"ancestors": far_bit}),
    (ValueError, "window is -1", {"options": lambda o: {**o, "window": -1}}),
    (ValueError, "node_offset is 9", {"options": lambda o: {**o, "node_offset": 2**63 - 1}}),
    (ValueError, "softcap", {"options": lambda o: {**o, "softcap": float("nan")}}),
    (ValueError, r"num_nodes\[0\] is 4", {"options": lambda o: {**o, "num_nodes": i32(4, 0)}}),
    (ValueError, "out has shape", {"options": lambda o: {**o, "out": torch.empty(2, 3, 4, 32)}}),
]


@pytest.mark.parametrize(("error", "message", "changes"), BAD)
def test_bad_arguments_are_named(error, message, changes):
    case = attention_case(8, [20, 40], 3)
    case = replace(case, **{name: f(getattr(case, name)) for name, f in changes.items()})
    with pytest.raises(error, match=message):
        case.run(paged_tree_attention)


def test_pages_behind_the_window_may_be_gone():
    case = attention_case(9, [200], 2, window=20)
    expected = case.run(paged_tree_attention)
    case.block_table[0, :11] = -1  # slots 0 to 175; the root sees 181 to 200
    assert torch.equal(case.run(paged_tree_attention), expected)
    case.block_table[0, 11] = -1
    with pytest.raises(ValueError, match=r"block_table\[0, 11\]"):
        case.run(paged_tree_attention)


# ---- frameworks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numpy(dtype):
    case = attention_case(10, [50], 4, dtype=dtype)
    arrays = [
        x.numpy() for x in (case.q, case.k_pages, case.v_pages, case.block_table, case.seq_lens)
    ]
    out = paged_tree_attention(*arrays, case.ancestors.numpy(), **case.options)
    assert out.dtype == arrays[0].dtype
    assert torch.equal(torch.from_numpy(out), case.run(paged_tree_attention))


def test_out_is_written_and_returned():
    case = attention_case(11, [9], 2)
    out = torch.empty(case.q.shape)
    assert case.run(paged_tree_attention, out=out) is out
    assert torch.equal(out, case.run(paged_tree_attention))


def test_compiles_whole():
    case = attention_case(12, [50, 3], 4)

    def f(q, k, v, table, lens, words):
        return paged_tree_attention(q * 2, k, v, table, lens, words, scale=0.1, window=5) + 1

    args = (
        case.q,
        case.k_pages,
        case.v_pages,
        case.block_table,
        case.seq_lens,
        case.ancestors,
    )
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), f(*args))
