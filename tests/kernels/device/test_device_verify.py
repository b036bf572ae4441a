"""verify_tree_match on accelerators: the very tokens of the CPU and of the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.backends import random_examples
from helpers.sampling_cases import chain, random_logits, random_walk
from inferlab.kernels import (
    SamplingTensors,
    build_tree,
    reference,
    sample,
    verify_tree_match,
    verify_workspace,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "ties", "flat", "masked", "broken"]


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def random_case(seed, batch, nodes, vocab, kind, dtype):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (batch, nodes, vocab), kind, dtype)
    walk, allowed = random_walk(rng, logits)
    return (logits, *walk), {"allowed_vocab": allowed}


@random_examples(30)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([1, 3]),
    nodes=st.sampled_from([1, 2, 7, 64]),
    vocab=st.sampled_from([1, 2, 5, 100, 1000, 4097]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_the_cpu_and_the_reference(backend, seed, batch, nodes, vocab, kind, dtype):
    arguments, options = random_case(seed, batch, nodes, vocab, kind, dtype)
    got = backend.call(verify_tree_match, *arguments, **options)
    assert_same(got, verify_tree_match(*arguments, **options))
    assert_same(got, reference.verify_tree_match(*arguments, **options))


# On the shim's 6 multiprocessors: several blocks per row, which read a greedy sequence's rows at
# once or one after another; and a block for each sequence.
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(backend, batch, dtype):
    rng = np.random.default_rng(batch)
    logits = random_logits(rng, (batch, 6, 5001), "normal", dtype)
    positions = 70 + torch.arange(1, 7).expand(batch, 6).contiguous()
    greedy = {"temperature": [0.0, 1.0, 0.7, 0.0][:batch], "top_p": [1.0, 1.0, 0.9, 0.5][:batch]}
    plain = {"temperature": 1.0, "seed": list(range(batch))}
    filtered = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 3}
    for options in (greedy, plain, filtered):
        sampling = SamplingTensors.of(batch, **options)
        tokens = torch.zeros(batch, 6, dtype=torch.int32)
        tokens[:, 1:] = sample(logits, positions, sampling)[:, :5, 0]
        tokens[:, 4] += 1  # node 3 is the last one entered
        arguments = (logits, tokens, chain(6, batch), i32(*[70] * batch), sampling)
        expected = verify_tree_match(*arguments)
        assert expected.num_accepted.tolist() == [4] * batch
        assert_same(backend.call(verify_tree_match, *arguments), expected)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(("nodes", "vocab"), [(300, 20), (24, 1500)])
@pytest.mark.parametrize("penalty", [0.0, 0.2])
def test_a_chain_that_guesses_right_to_the_end(backend, temperature, nodes, vocab, penalty):
    """Every node is visited, and penalties see the path."""
    generator = torch.Generator().manual_seed(nodes)
    logits = torch.randn(1, nodes, vocab, generator=generator) * 3
    sampling = SamplingTensors.of(
        1, temperature=temperature, seed=9, frequency_penalty=penalty, prompt_tokens=[[3, 1, 3]]
    )
    tokens = torch.zeros(1, nodes, dtype=torch.int32)
    links = chain(nodes)
    for _ in range(nodes):  # the walk's own tokens, one more right with each turn
        if penalty == 0.0:
            positions = 20 + torch.arange(1, nodes + 1).unsqueeze(0)
            tokens[0, 1:] = sample(logits, positions, sampling)[0, :-1, 0]
            break
        result = verify_tree_match(logits, tokens, links, i32(20), sampling)
        count = int(result.num_accepted)
        tokens[0, 1 : count + 1] = result.accepted_tokens[0, : min(count, nodes - 1)]
    arguments = (logits, tokens, links, i32(20), sampling)
    expected = verify_tree_match(*arguments)
    assert int(expected.num_accepted) == nodes
    assert_same(backend.call(verify_tree_match, *arguments), expected)


def test_a_root_with_many_children(backend):
    nodes = 400
    links = build_tree(torch.tensor([[-1] + [0] * (nodes - 1)], dtype=torch.int32))
    logits = torch.zeros(1, nodes, 500)
    logits[0, 0, 399] = logits[0, 399, 6] = 9.0
    tokens = torch.arange(nodes, dtype=torch.int32).unsqueeze(0)
    got = backend.call(
        verify_tree_match, logits, tokens, links, i32(4), SamplingTensors.of(1, temperature=0.0)
    )
    assert got.accepted_nodes[0, :3].tolist() == [0, 399, -1]
    assert got.accepted_tokens[0, :3].tolist() == [399, 6, -1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_links_that_do_not_go_up_end_the_walk(backend, temperature):
    """On a device nobody has looked at the links: they must not lead out of the tree or round."""
    logits = torch.zeros(5, 3, 3000)
    logits[..., 7] = 90.0
    tokens = torch.full((5, 3), 7, dtype=torch.int32)
    links = chain(3, 5)
    links.first_child[:4, 1] = i32(0, 1, 3, -(2**31))
    links.next_sibling[4] = i32(0, 0, 2**31 - 1)
    links.first_child[4] = i32(1, -5, 0)
    sampling = SamplingTensors.of(5, temperature=temperature)
    got = backend.call(verify_tree_match, logits, tokens, links, i32(1, 1, 1, 1, 1), sampling)
    assert got.num_accepted.tolist() == [2] * 5
    assert got.accepted_nodes.tolist() == [[0, 1, -1]] * 5
    assert got.accepted_tokens.tolist() == [[7, 7, -1]] * 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocab", [300, 3000])
def test_broken_rows_end_the_walk_only_where_it_gets(backend, temperature, poison, vocab):
    links = build_tree(i32([-1, 0, 0, 1]).view(1, 4))
    logits = torch.full((1, 4, vocab), -50.0)
    logits[0, :, 7] = 50.0
    tokens = i32([0, 7, 8, 7]).view(1, 4)
    for sampling in (
        SamplingTensors.of(1, temperature=temperature),
        SamplingTensors.of(1, temperature=temperature, top_k=20, top_p=0.9),
    ):
        for node, expected in [(2, [7, 7, 7]), (1, [7, -1]), (0, [-1])]:
            row = logits.clone()
            row[0, node] = poison
            got = backend.call(verify_tree_match, row, tokens, links, i32(3), sampling)
            count = int(got.num_accepted)
            assert got.accepted_tokens[0, :count].tolist() == expected


@pytest.mark.parametrize("fill", [0xFF, 0x5A])
def test_one_workspace_for_all_calls(backend, fill):
    """It may hold anything, and `out` is written to the end."""
    for seed in range(3):
        arguments, options = random_case(seed, 2, 5, 2000, "normal", torch.bfloat16)
        expected = verify_tree_match(*arguments, **options)
        moved = backend.to(arguments)
        with backend.active():
            workspace = verify_workspace(moved[0], moved[4])
            assert workspace is not None
            workspace.fill_(fill)
            out = backend.to(type(expected)(*(torch.full_like(t, 77) for t in expected)))
            for _ in range(2):
                got = verify_tree_match(*moved, **options, out=out, workspace=workspace)
                assert got is out
                assert_same([t.cpu() for t in got], expected)
            if backend.is_metal and not moved[4].changes_logits:
                continue  # there rows are copied only where penalties change them
            with pytest.raises(ValueError, match="workspace has 100 bytes; it must have at least"):
                verify_tree_match(*moved, workspace=workspace[:100])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_past_two_to_the_32_elements(backend, temperature):
    """Memory is touched only where it is read."""
    if backend.device != "cpu":
        pytest.skip("8 GiB that only an operating system gives for nothing")
    vocab, rows = 1 << 16, (1 << 16) + 2
    memory = torch.empty(rows * vocab, dtype=torch.bfloat16).view(rows, vocab)
    memory[0] = memory[-1] = -50
    memory[0, 17] = memory[-1, 4242] = 50
    tree = memory[:: rows - 1].view(1, 2, vocab)
    batch = memory[:: rows - 1].view(2, 1, vocab)
    assert tree.stride(1) > 2**32
    one, two = (SamplingTensors.of(b, temperature=temperature) for b in (1, 2))
    with backend.active():
        got = verify_tree_match(tree, i32([0, 17]).view(1, 2), chain(2), i32(1), one)
        assert got.accepted_tokens.tolist() == [[17, 4242]]
        got = verify_tree_match(batch, i32([0], [0]), chain(1, 2), i32(1, 1), two)
        assert got.accepted_tokens.tolist() == [[17], [4242]]


def test_padding_is_never_chosen(backend):
    logits = torch.zeros(3, 2, 3000)
    logits[..., 2000:] = torch.nan
    tokens = i32([0, 2500], [0, 2500], [0, 2500])
    sampling = SamplingTensors.of(3, temperature=[0.0, 1.0, 1.0], top_p=[1.0, 1.0, 0.8])
    got = backend.call(
        verify_tree_match, logits, tokens, chain(2, 3), i32(3, 3, 3), sampling, allowed_vocab=2000
    )
    assert got.num_accepted.tolist() == [1, 1, 1]
    assert int(got.accepted_tokens[:, 0].min()) >= 0
    assert int(got.accepted_tokens.max()) < 2000
