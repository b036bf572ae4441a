"""build_tree against the reference, its invariants, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sampling_cases import random_parents
from inferlab import _C
from inferlab.kernels import build_tree, reference


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([1, 3]),
    nodes=st.sampled_from([1, 2, 7, 63, 64, 65, 256]),
)
def test_matches_the_reference(seed, batch, nodes):
    parents = random_parents(np.random.default_rng(seed), batch, nodes)
    for ours, theirs in zip(build_tree(parents), reference.build_tree(parents), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_small_tree():
    links = build_tree(torch.tensor([[-1, 0, 0, 1, 1, -2]], dtype=torch.int32))
    assert links.depth.tolist() == [[0, 1, 1, 2, 2, -1]]
    assert links.first_child.tolist() == [[1, 3, -1, -1, -1, -1]]
    assert links.next_sibling.tolist() == [[-1, 2, -1, 4, -1, -1]]
    assert links.ancestors[..., 0].tolist() == [[0b1, 0b11, 0b101, 0b1011, 0b10011, 0]]


def test_bits_past_the_first_word():
    links = build_tree(torch.arange(-1, 129, dtype=torch.int32).unsqueeze(0))
    assert links.ancestors.shape == (1, 130, 3)
    assert links.ancestors[0, 129].tolist() == [-1, -1, 0b11]
    assert links.ancestors[0, 64].tolist() == [-1, 1, 0]


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([[0, 0]], r"parents\[0, 0\] is 0; it must be -1"),
        ([[-2, -2]], r"parents\[0, 0\] is -2; it must be -1"),
        ([[-1, 1]], r"parents\[0, 1\] is 1; it must be in \[0, 1\)"),
        ([[-1, 0, 5]], r"parents\[0, 2\] is 5"),
        ([[-1, -1]], r"parents\[0, 1\] is -1"),
        ([[-1, -3]], r"parents\[0, 1\] is -3"),
        ([[-1, -2, 1]], r"parents\[0, 2\] is 1; which is a padding node"),
        ([[-1, 0], [-1, 7]], r"parents\[1, 1\] is 7"),
    ],
)
def test_refuses_what_is_no_tree(parents, message):
    with pytest.raises(ValueError, match=message):
        build_tree(torch.tensor(parents, dtype=torch.int32))


def test_refuses_wrong_dtype_and_shape():
    with pytest.raises(TypeError, match="parents has dtype int64; it must be int32"):
        build_tree(torch.tensor([[-1]]))
    with pytest.raises(ValueError, match="parents has shape"):
        build_tree(torch.tensor([-1], dtype=torch.int32))
    with pytest.raises(ValueError, match="parents must be contiguous"):
        build_tree(torch.full((4, 4), -1, dtype=torch.int32)[:, ::2])


def test_numpy_in_numpy_out():
    links = build_tree(np.array([[-1, 0, 1]], dtype=np.int32))
    assert all(isinstance(t, np.ndarray) for t in links)
    assert links.depth.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    def depths(parents):
        links = build_tree(parents)
        return links.depth + 1, links.ancestors

    parents = torch.tensor([[-1, 0, 0, 2]], dtype=torch.int32)
    compiled = torch.compile(depths, fullgraph=True, backend=backend)
    for ours, theirs in zip(compiled(parents), depths(parents), strict=True):
        assert torch.equal(ours, theirs)


def test_threads_agree():
    parents = random_parents(np.random.default_rng(5), 64, 100)
    _C.set_num_threads(1)
    alone = build_tree(parents)
    _C.set_num_threads(0)
    assert all(torch.equal(a, b) for a, b in zip(alone, build_tree(parents), strict=True))
