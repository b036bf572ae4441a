"""build_tree on accelerators: the reference's integers, and padding where it would refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.backends import random_examples
from helpers.sampling_cases import random_parents
from inferlab.kernels import build_tree, reference


def assert_same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@random_examples(25)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([1, 3]),
    nodes=st.sampled_from([1, 2, 7, 63, 64, 65, 130]),
)
def test_matches_the_reference(backend, seed, batch, nodes):
    parents = random_parents(np.random.default_rng(seed), batch, nodes)
    assert_same(backend.call(build_tree, parents), reference.build_tree(parents))


@pytest.mark.parametrize("shape", ["chain", "star", "comb"])
def test_large_trees(backend, shape):
    nodes = 520
    parents = torch.arange(-1, nodes - 1, dtype=torch.int32)
    if shape == "star":
        parents[1:] = 0
    if shape == "comb":  # a spine of even nodes, each with an odd leaf
        parents[2::2] -= 1
    assert_same(backend.call(build_tree, parents[None]), reference.build_tree(parents[None]))


@random_examples(25)
@given(seed=st.integers(0, 2**32 - 1), nodes=st.sampled_from([2, 9, 70]))
def test_what_is_no_tree_becomes_padding(backend, seed, nodes):
    generator = np.random.default_rng(seed)
    parents = random_parents(generator, 2, nodes)
    for n in generator.integers(0, nodes, 3):
        parents[1, n] = int(generator.choice([-(2**31), -3, -1, n, n + 1, nodes, 2**31 - 1]))
    pruned = parents.clone()
    for n in range(nodes):
        parent = int(parents[1, n])
        good = parent == -1 if n == 0 else 0 <= parent < n and pruned[1, parent] != -2
        if not good:
            pruned[1, n] = -2
    got = backend.call(build_tree, parents)
    if pruned[1, 0] == -2:  # no root: nothing is in the tree
        assert (got.depth[1] == -1).all()
        assert (got.first_child[1] == -1).all()
        assert (got.next_sibling[1] == -1).all()
        assert not got.ancestors[1].any()
        got, pruned = (t[:1] for t in got), pruned[:1]
    assert_same(got, reference.build_tree(pruned))
