"""verify_tree_match: the walk emits plain decoding's tokens; and what all verifiers share."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.isas import ISAS
from helpers.sampling_cases import (
    chain,
    likely_tokens,
    random_logits,
    random_parents,
    random_walk,
)
from inferlab import _C
from inferlab.kernels import (
    SamplingTensors,
    TreeLinks,
    build_tree,
    reference,
    sample,
    verify_tree_lossy,
    verify_tree_match,
    verify_tree_rejection,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def restore_native_settings():
    yield
    _C.force_isa("auto")
    _C.set_num_threads(0)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([1, 3]),
    nodes=st.sampled_from([1, 2, 7, 64, 65, 256]),
    vocab=st.sampled_from([1, 19, 111, 1000, 4097]),
    kind=st.sampled_from(["normal", "ties", "flat", "masked", "broken"]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    threads=st.sampled_from([1, 2]),
)
def test_matches_the_reference(seed, batch, nodes, vocab, kind, dtype, isa, threads):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (batch, nodes, vocab), kind, dtype)
    walk, allowed = random_walk(rng, logits)
    arguments = (logits, *walk)
    _C.force_isa(isa)
    _C.set_num_threads(threads)
    assert_same(
        verify_tree_match(*arguments, allowed_vocab=allowed),
        reference.verify_tree_match(*arguments, allowed_vocab=allowed),
    )


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_emits_the_tokens_of_plain_decoding(temperature):
    """A chain that guesses right up to node 3: the walk says what `sample` says, row by row."""
    logits = torch.randn(1, 6, 300)
    sampling = SamplingTensors.of(1, temperature=temperature, top_k=40, top_p=0.95, seed=9)
    positions = 20 + torch.arange(1, 7).unsqueeze(0)
    plain = sample(logits, positions, sampling)[0, :, 0]
    tokens = torch.cat([i32(0), plain[:5]]).unsqueeze(0)
    tokens[0, 4] = (tokens[0, 4] + 1) % 300
    result = verify_tree_match(logits, tokens, chain(6), i32(20), sampling)
    assert result.num_accepted.tolist() == [4]
    assert result.accepted_nodes.tolist() == [[0, 1, 2, 3, -1, -1]]
    assert result.accepted_tokens[0, :4].tolist() == plain[:4].tolist()
    assert result.accepted_tokens[0, 4:].tolist() == [-1, -1]


def test_penalties_count_the_path():
    """The token of node 1 is in node 1's own context, as in plain decoding."""
    logits = torch.tensor([[[3.0, 0.0, 0.0], [3.0, 2.5, 0.0]]])
    sampling = SamplingTensors.of(
        1, temperature=0.0, presence_penalty=1.0, prompt_tokens=[[2]], output_tokens=[[2]]
    )
    result = verify_tree_match(logits, i32([2, 0]).view(1, 2), chain(2), i32(2), sampling)
    assert result.accepted_tokens.tolist() == [[0, 1]]  # 3 - 1 < 2.5 once 0 is on the path


def test_first_of_equal_children_is_entered():
    links = build_tree(i32([-1, 0, 0, 1, 2]).view(1, 5))
    logits = torch.zeros(1, 5, 8)
    logits[0, :, 3] = 1
    result = verify_tree_match(
        logits, i32([0, 3, 3, 3, 3]).view(1, 5), links, i32(5), SamplingTensors.of(1)
    )
    assert result.accepted_nodes.tolist() == [[0, 1, 3, -1, -1]]
    assert result.accepted_tokens.tolist() == [[3, 3, 3, -1, -1]]


def all_verifiers(logits, tokens, links, seq_lens, sampling, **options):
    arguments = (tokens, links, seq_lens, sampling)
    yield verify_tree_match(logits, *arguments, **options)
    yield verify_tree_rejection(logits, None, *arguments, **options)
    yield verify_tree_rejection(logits, logits, *arguments, **options)
    yield verify_tree_lossy(logits, *arguments, "conf_threshold", 0.5, **options)
    yield verify_tree_lossy(logits, *arguments, "topk_agree", 1, **options)
    yield verify_tree_lossy(logits, *arguments, "typical", 0.3, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_broken_rows_end_the_walk_only_where_it_gets(temperature, poison):
    links = build_tree(i32([-1, 0, 0, 1]).view(1, 4))
    logits = torch.full((1, 4, 300), -50.0)
    logits[0, :, 7] = 50.0  # every policy wants 7
    tokens = i32([0, 7, 8, 7])
    sampling = SamplingTensors.of(1, temperature=temperature)
    for node, expected in [(2, [7, 7, 7]), (1, [7, -1]), (0, [-1])]:
        row = logits.clone()
        row[0, node] = poison
        for result in all_verifiers(row, tokens.view(1, 4), links, i32(3), sampling):
            count = int(result.num_accepted)
            assert result.accepted_tokens[0, :count].tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_vocabulary_is_never_chosen(temperature):
    logits = torch.zeros(50, 2, 40)
    logits[..., 30:] = 50
    tokens = torch.tensor([[0, 35]] * 50, dtype=torch.int32)
    sampling = SamplingTensors.of(50, temperature=temperature, seed=list(range(50)))
    for result in all_verifiers(
        logits, tokens, chain(2, 50), i32(*[3] * 50), sampling, allowed_vocab=30
    ):
        assert (result.num_accepted == 1).all()
        assert int(result.accepted_tokens[:, 0].min()) >= 0
        assert int(result.accepted_tokens.max()) < 30


def test_rows_past_two_to_the_32_elements():
    vocab, rows = 1 << 16, (1 << 16) + 2
    memory = torch.empty(rows * vocab, dtype=torch.bfloat16).view(rows, vocab)
    memory[0] = memory[-1] = -50
    memory[0, 17] = memory[-1, 4242] = 50
    tree = memory[:: rows - 1].view(1, 2, vocab)
    batch = memory[:: rows - 1].view(2, 1, vocab)
    assert tree.stride(1) > 2**32
    for temperature in (0.0, 1.0):
        one, two = (SamplingTensors.of(b, temperature=temperature) for b in (1, 2))
        for result in all_verifiers(tree, i32([0, 17]).view(1, 2), chain(2), i32(1), one):
            assert result.accepted_tokens.tolist() == [[17, 4242]]
        for result in all_verifiers(batch, i32([0], [0]), chain(1, 2), i32(1, 1), two):
            assert result.accepted_tokens.tolist() == [[17], [4242]]


def test_result_does_not_depend_on_the_batch():
    rng = np.random.default_rng(8)
    logits = random_logits(rng, (5, 20, 151), "normal", torch.bfloat16)
    draft = random_logits(rng, (5, 20, 151), "normal", torch.bfloat16)
    parents = random_parents(rng, 5, 20)
    links = build_tree(parents)
    sampling = SamplingTensors.of(5, temperature=1.0, top_p=0.9, seed=[1, 2, 3, 4, 5])
    seq_lens = i32(9, 8, 7, 6, 5)
    tokens = likely_tokens(rng, logits, parents, links, seq_lens, sampling)
    together = [
        verify_tree_match(logits, tokens, links, seq_lens, sampling),
        verify_tree_rejection(logits, draft, tokens, links, seq_lens, sampling),
        verify_tree_lossy(logits, tokens, links, seq_lens, sampling, "typical", 0.5),
    ]
    for b in range(5):
        one = slice(b, b + 1)
        own = SamplingTensors.of(1, temperature=1.0, top_p=0.9, seed=b + 1)
        rest = (tokens[one], TreeLinks(*(t[one] for t in links)), seq_lens[one], own)
        alone = [
            verify_tree_match(logits[one], *rest),
            verify_tree_rejection(logits[one], draft[one], *rest),
            verify_tree_lossy(logits[one], *rest, "typical", 0.5),
        ]
        for whole, part in zip(together, alone, strict=True):
            assert_same(part, [t[one] for t in whole])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": i32([0, 50, 1])}, ValueError, r"tokens\[0, 1\] is 50; it must be in \[0, 50\)"),
        ({"tokens": i32([0, 1, -1])}, ValueError, r"tokens\[0, 2\] is -1"),
        ({"tokens": i32([77, 1, 1])}, ValueError, r"tokens\[0, 0\] is 77"),
        ({"tokens": i32([0, 1])}, ValueError, r"tokens has shape \[1, 2\]; it must be \[1, 3\]"),
        ({"tokens": torch.zeros(1, 3).long()}, TypeError, "tokens has dtype int64"),
        ({"seq_lens": i32(1, 2)}, ValueError, r"seq_lens has shape \[2\]"),
        ({"seq_lens": i32(-1)}, ValueError, r"seq_lens\[0\] is -1"),
        ({"logits": torch.zeros(3, 50)}, ValueError, "logits has shape"),
        ({"logits": torch.zeros(1, 3, 50).double()}, TypeError, "logits has dtype float64"),
        (
            {"links": chain(3)._replace(first_child=i32([0, 2, -1]).view(1, 3))},
            ValueError,
            r"links.first_child\[0, 0\] is 0",
        ),
        (
            {"links": chain(3)._replace(next_sibling=i32([-1, 3, -1]).view(1, 3))},
            ValueError,
            r"links.next_sibling\[0, 1\] is 3",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "logits": torch.zeros(1, 3, 50),
        "tokens": i32([0, 1, 2]).view(1, 3),
        "links": chain(3),
        "seq_lens": i32(4),
        "sampling": SamplingTensors.of(1),
    }
    change = {k: v.view(1, -1) if k == "tokens" else v for k, v in change.items()}
    with pytest.raises(error, match=message):
        verify_tree_match(**{**arguments, **change})


def test_padding_nodes_may_hold_any_token():
    links = build_tree(i32([-1, 0, -2]).view(1, 3))
    tokens = i32([0, 1, -7]).view(1, 3)
    verify_tree_match(torch.zeros(1, 3, 50), tokens, links, i32(4), SamplingTensors.of(1))


def test_numpy_in_numpy_out():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, 3, 50)).astype(np.float32)
    tokens, seq_lens = np.array([[0, 1, 2]], np.int32), np.array([4], np.int32)
    links = build_tree(np.array([[-1, 0, 0]], np.int32))
    tensors = (torch.from_numpy(tokens), TreeLinks(*map(torch.from_numpy, links)))
    lens = torch.from_numpy(seq_lens)
    sampling = SamplingTensors.of(1, temperature=1.0)
    pairs = zip(
        all_verifiers(logits, tokens, links, seq_lens, sampling),
        all_verifiers(torch.from_numpy(logits), *tensors, lens, sampling),
        strict=True,
    )
    for arrays, expected in pairs:
        assert all(isinstance(a, np.ndarray) for a in arrays)
        assert_same([torch.from_numpy(a) for a in arrays], expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    def step(logits, parents, tokens, seq_lens, sampling):
        links = build_tree(parents)
        return [
            (r.num_accepted + 1, r.accepted_tokens)
            for r in all_verifiers(logits / 2, tokens, links, seq_lens, sampling)
        ]

    arguments = (
        torch.randn(2, 3, 50),
        i32([-1, 0, 0], [-1, 0, 1]),
        i32([0, 1, 2], [3, 4, 5]),
        i32(4, 6),
        SamplingTensors.of(2, temperature=1.0, top_k=9, seed=3),
    )
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for ours, theirs in zip(compiled(*arguments), step(*arguments), strict=True):
        assert_same(ours, theirs)
