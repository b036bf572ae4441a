"""paged_tree_attention on accelerators: against the float64 reference; what a row may depend on."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.backends import random_examples
from helpers.kv_cases import ancestor_words, attention_case, random_parents
from helpers.pairwise import pairwise
from inferlab.kernels import attention_workspace, paged_tree_attention, reference

# fp32 sums some hundred terms; 16-bit weights and results are rounded, to 8 or 11 bits.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BF16 = {"dtype": torch.bfloat16}
# For sanitizers one type is enough where the tests against the reference run the others' kernels.
ALIKE = [
    pytest.param(dtype, marks=() if dtype == torch.bfloat16 else pytest.mark.numbers)
    for dtype in TOLERANCE
]
SPLIT, SPAN = 256, 1024  # slots that the CUDA kernel takes at a time: their edges are tested


def run(backend, case, **extra):
    return case.run(lambda *a, **k: backend.call(paged_tree_attention, *a, **k), **extra)


def check(backend, case):
    expected = case.run(reference.paged_tree_attention, compute_dtype=torch.float64)
    actual = run(backend, case)
    assert actual.dtype == case.q.dtype
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- against the reference -----------------------------------------------------------------------


@random_examples(50)
@given(
    seed=st.integers(0, 2**31),
    lens=st.lists(
        st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300]),
        min_size=1,
        max_size=2,
    ),
    nodes=st.sampled_from([1, 2, 5, 17, 33, 65]),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 2, 3, 4]),
    dim=st.sampled_from([8, 40, 64, 72, 80, 96]),
    page_size=st.sampled_from([1, 2, 16, 64]),
    dtype=st.sampled_from(list(TOLERANCE)),
    tree=st.booleans(),
    ragged=st.booleans(),
    node_offset=st.sampled_from([0, 0, 3]),
    window=st.sampled_from([0, 0, 1, 7, 64, 257]),
    softcap=st.sampled_from([0.0, 0.0, 2.0]),
)
def test_matches_the_reference(backend, seed, lens, nodes, **shape):
    check(backend, attention_case(seed, lens, nodes, **shape))


@pairwise(
    dim=[8, 40, 64, 72, 80, 96, 128, 136, 256],
    nodes=[3, 9],  # 16 rows and fewer, and more
    dtype=list(TOLERANCE),
)
def test_head_dims(backend, dim, nodes, dtype):
    check(backend, attention_case(1, [37, 70], nodes, dim=dim, kv_heads=1, dtype=dtype))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 71])
def test_query_heads_share_a_kv_head(backend, group):
    check(backend, attention_case(2, [30, 5], 3, group=group, **BF16))


@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_page_sizes(backend, page_size, dtype):
    check(backend, attention_case(3, [150, 64], 4, page_size=page_size, dtype=dtype))


@pairwise(
    edge=[SPLIT, 2 * SPLIT, SPAN],
    past=[-5, -4, -3, -1, 0, 1, 31],
    heads=[1, 6],  # few blocks: parts are splits; many: parts are spans
)
def test_lengths_about_the_edges_of_splits(backend, edge, past, heads):
    """The committed slots or the nodes end before, at and behind an edge."""
    check(backend, attention_case(4, [edge + past], 4, kv_heads=heads, group=1, **BF16))


@pytest.mark.parametrize(
    ("lens", "nodes", "options"),
    [
        ([1500, 3, 2047], 3, {}),
        ([2300], 5, {"window": 1100}),  # the window starts inside a split
        ([2300, 40], 5, {"window": 300, "kv_heads": 4}),
        ([700], 256, {"kv_heads": 1, "group": 1, **BF16}),  # the largest tree
        ([520], 70, {"window": 20, "kv_heads": 1, **BF16}),  # the window ends inside paths
        ([3000], 1, {"kv_heads": 8, "group": 1, "dtype": torch.float16}),
        ([40], 130, {"tree": False, "kv_heads": 1, **BF16}),  # a prompt behind a cached prefix
        ([0], 530, {"tree": False, "kv_heads": 1, "group": 1, **BF16}),
        ([0, 280], 300, {"tree": False, "kv_heads": 1, "group": 1, "window": 50, **BF16}),
        ([290], 20, {"tree": False, "node_offset": 30, "ragged": True}),
    ],
)
def test_long_and_large(backend, lens, nodes, options):
    check(backend, attention_case(5, lens, nodes, **options))


def test_sequences_without_nodes_and_nodes_without_bits_give_zeros(backend):
    case = attention_case(6, [300, 20, 0], 9, num_nodes=torch.tensor([4, 0, 9], dtype=torch.int32))
    case.ancestors[0, 2] = 0
    case.ancestors[2, 5:] = 0
    out = run(backend, case)
    assert (out[0, 2] == 0).all()
    assert (out[0, 4:] == 0).all()
    assert (out[1] == 0).all()
    assert (out[2, 5:] == 0).all()
    check(backend, case)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_q_of_any_strides(backend, dtype):
    case = attention_case(7, [40, 9], 3, dtype=dtype)
    wide = torch.randn(2, 3, 4, 3 * 64 + 1).to(dtype)
    check(backend, replace(case, q=wide[..., 64:128]))  # odd strides
    check(backend, replace(case, q=torch.randn(3, 4, 2, 64).to(dtype).permute(2, 0, 1, 3)))


# ---- what a row depends on -----------------------------------------------------------------------


def row_alone(case, b, n):
    return replace(
        case,
        q=case.q[b : b + 1, n : n + 1],
        block_table=case.block_table[b : b + 1],
        seq_lens=case.seq_lens[b : b + 1],
        ancestors=None if case.ancestors is None else case.ancestors[b : b + 1, n : n + 1],
    ).with_options(node_offset=n)


@pytest.mark.parametrize("dtype", ALIKE)
@pytest.mark.parametrize("options", [{}, {"tree": False}, {"window": 300, "softcap": 3.0}])
def test_a_row_is_the_same_alone_and_in_a_batch(backend, options, dtype):
    """Alone it is one of few rows of few blocks, in the batch one of many rows of many blocks."""
    case = attention_case(8, [1300, 37, 250], 19, dim=40, dtype=dtype, **options)
    together = run(backend, case)
    for b, n in [(0, 0), (0, 1), (0, 7), (0, 18), (1, 3), (2, 18)]:
        assert torch.equal(run(backend, row_alone(case, b, n))[0, 0], together[b, n])


@pytest.mark.parametrize("dtype", ALIKE)
@pytest.mark.parametrize("options", [{}, {"window": 900}])
def test_splits_merge_alike_in_blocks_and_in_workspace(backend, options, dtype):
    case = attention_case(9, [2100], 2, kv_heads=6, group=1, dtype=dtype, **options)
    every_head = run(backend, case)
    for head in (0, 5):
        one = slice(head, head + 1)
        pages = {x: getattr(case, x)[:, :, one].contiguous() for x in ("k_pages", "v_pages")}
        alone = run(backend, replace(case, q=case.q[:, :, one], **pages))
        assert torch.equal(alone, every_head[:, :, one])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_that_a_row_does_not_see_change_no_bit(backend, dtype):
    """A node's siblings, and what was written behind the window, may hold other numbers."""
    g = torch.Generator().manual_seed(10)
    parents = random_parents(40, g)
    case = attention_case(10, [90], 40, page_size=1, window=60, dtype=dtype)
    words = ancestor_words(parents)[None]
    case = replace(case, ancestors=words)
    expected = run(backend, case)
    node = 39
    seen = [n for n in range(40) if words[0, node, 0].item() >> n & 1]
    begin = 90 + len(seen) - 60
    hidden = [s for s in range(130) if s < begin or (s >= 90 and s - 90 not in seen)]
    for pages in (case.k_pages, case.v_pages):
        ids = case.block_table[0, hidden].long()
        pages[ids] = 3 * torch.randn(len(hidden), *pages.shape[1:], generator=g).to(dtype)
    got = run(backend, case)
    assert torch.equal(got[0, node], expected[0, node])
    assert not torch.equal(got, expected)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_nan_in_a_seen_key_is_not_lost(backend, dtype):
    case = attention_case(11, [40], 1, dtype=dtype)
    case.k_pages[case.block_table[0, 1], 3, 0, 5] = float("nan")  # slot 19, KV head 0
    out = run(backend, case)
    assert out[0, 0, :2].isnan().all()
    assert out[0, 0, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_pages_behind_the_window_may_be_gone_or_others(backend, dtype):
    case = attention_case(12, [700], 2, window=20, dtype=dtype)
    expected = run(backend, case)
    case.block_table[0, :42] = -1  # slots 0 to 671; the root sees 681 to 700
    assert torch.equal(run(backend, case), expected)
    case.block_table[0, :42] = int((case.block_table < 0).nonzero()[0, 0])
    for pages in (case.k_pages, case.v_pages):
        pages[case.block_table[0, 42], :9] = float("nan")  # slots 672 to 680, beside seen ones
        pages[case.block_table[0, 0]] = float("nan")
    assert torch.equal(run(backend, case), expected)


# ---- workspace, output, arguments ----------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_workspace_may_hold_anything_and_be_used_again(backend, heads, dtype):
    if backend.is_metal:
        pytest.skip("needs none on Metal")
    case = attention_case(13, [1500, 3, 600], 3, kv_heads=heads, dtype=dtype)
    expected = run(backend, case)
    with backend.active():
        moved = [backend.to(t) for t in (case.q, case.k_pages, case.block_table)]
        workspace = attention_workspace(*moved)
    assert workspace is not None
    workspace.fill_(0xFF)

    def call(*args, **options):
        return paged_tree_attention(*args, workspace=workspace, **options)

    for _ in range(2):
        assert torch.equal(case.run(lambda *a, **k: backend.call(call, *a, **k)), expected)
    workspace = workspace[:-1]
    with pytest.raises(ValueError, match=f"workspace has {workspace.numel()} bytes"):
        case.run(lambda *a, **k: backend.call(call, *a, **k))


def test_out_is_written_and_returned(backend):
    case = attention_case(14, [9], 2)
    moved = [backend.to(t) for t in (case.q, case.k_pages, case.v_pages)]
    tables = [backend.to(t) for t in (case.block_table, case.seq_lens, case.ancestors)]
    out = backend.to(torch.empty(case.q.shape))
    with backend.active():
        assert paged_tree_attention(*moved, *tables, **case.options, out=out) is out
    assert torch.equal(out.cpu(), run(backend, case))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_values_out_of_range_touch_no_memory_that_is_not_theirs(backend, dtype):
    """Page ids, lengths, counts and bits that no host has checked: finite nonsense, no fault."""
    case = attention_case(15, [300, 20], 3, dtype=dtype)
    case = replace(
        case,
        k_pages=case.k_pages.nan_to_num(1.0),
        v_pages=case.v_pages.nan_to_num(1.0),
        seq_lens=torch.tensor([2**31 - 1, -7], dtype=torch.int32),
        ancestors=case.ancestors | (-1 << 62),
    ).with_options(num_nodes=torch.tensor([99, -1], dtype=torch.int32))
    case.block_table[0, ::2] = 2**31 - 1
    case.block_table[0, 1::4] = -(2**31)
    out = run(backend, case)
    assert out.isfinite().all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("name", ["k_pages", "v_pages"])
def test_pages_that_are_not_aligned_are_refused(backend, name):
    case = attention_case(16, [9], 2)
    pages = getattr(case, name)
    storage = backend.to(torch.zeros(pages.numel() + 1))
    moved = {x: backend.to(getattr(case, x)) for x in ("q", "k_pages", "v_pages", "block_table")}
    moved[name] = storage[1:].view(pages.shape)
    lens, words = backend.to(case.seq_lens), backend.to(case.ancestors)
    with backend.active(), pytest.raises(ValueError, match=f"{name} .* 16 bytes"):
        paged_tree_attention(*moved.values(), lens, words, **case.options)
