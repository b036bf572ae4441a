"""Growing draft trees: the kernel against the torch operations, and against a search by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.backends import Backend
from inferlab import _C
from inferlab.kernels import Frontier, _registry, grow_level, grow_offsets, grow_tree

TORCH = Backend("fallback", "cpu", _registry.FALLBACK)


def grow(seed: int, batch: int, width: int, levels: int, words: int, nodes: int, missing: float):
    """A whole growth on random draws: all that came of it, in order."""
    rng = torch.Generator().manual_seed(seed)
    expanded_count = 1 + width * (levels - 1)
    tokens = torch.full((batch, width * expanded_count), -7, dtype=torch.int32)
    confidence = torch.full((batch, width * expanded_count), torch.nan)
    expanded = torch.full((batch, expanded_count), -7, dtype=torch.int32)
    above, history = None, []
    for level in range(levels):
        parents = 1 if level == 0 else width
        scores = 4 * torch.randn((batch, parents, width), generator=rng)
        scores = scores.sort(dim=-1, descending=True).values
        drawn = torch.randint(0, 50, (batch, parents, width), generator=rng, dtype=torch.int32)
        gone = torch.rand((batch, parents, 1), generator=rng) < missing
        cut = torch.randint(0, width + 1, (batch, parents, 1), generator=rng)
        drawn = drawn.masked_fill(gone & (torch.arange(width) >= cut), -1)
        scores = scores.masked_fill(drawn < 0, -torch.inf)
        last = None if level + 1 == levels else words
        found = grow_level(drawn, scores, above, level, tokens, confidence, expanded, last)
        history.append(None if found is None else Frontier(*found))
        above = None if found is None else found[2]
    roots = torch.arange(100, 100 + batch, dtype=torch.int32)
    tree = grow_tree(roots, tokens, confidence, expanded, width, nodes)
    return tokens, confidence, expanded, history, tree


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 3]),
    width=st.sampled_from([1, 2, 4, 9]),
    levels=st.integers(1, 9),
    share=st.floats(0, 1),
    missing=st.sampled_from([0.0, 0.3]),
    threads=st.sampled_from([1, 2]),
)
def test_the_kernel_grows_what_the_torch_operations_grow(
    seed, batch, width, levels, share, missing, threads
):
    _C.set_num_threads(threads)
    expanded = 1 + width * (levels - 1)
    nodes = 1 + round(share * width * expanded)
    case = (seed, batch, width, levels, expanded // 64 + 1, nodes, missing)
    ours = grow(*case)
    with TORCH.active():
        theirs = grow(*case)
    assert torch.equal(ours[0], theirs[0])
    assert torch.allclose(ours[1], theirs[1], atol=1e-4)
    assert torch.equal(ours[2], theirs[2])
    for one, other in zip(ours[3], theirs[3], strict=True):
        if one is None or other is None:
            assert one is other is None
        else:
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours[4][:2], theirs[4][:2], strict=True))
    assert torch.allclose(ours[4].confidence, theirs[4].confidence, atol=1e-4)
    check_by_hand(*ours, width)


def check_by_hand(tokens, confidence, expanded, history, tree, width):
    tree_tokens, tree_parents, tree_confidence = (t.tolist() for t in tree)
    for b in range(tokens.shape[0]):
        count = tokens.shape[1]
        order = sorted(range(count), key=lambda c: (-float(confidence[b, c]), c))
        kept = order[: len(tree_tokens[b]) - 1]
        assert tree_tokens[b][1:] == [int(tokens[b, c]) for c in kept]
        assert tree_confidence[b] == [0.0, *(float(confidence[b, c]) for c in kept)]
        for node, candidate in enumerate(kept, start=1):
            parent = int(expanded[b, candidate // width])
            expected = 0 if parent < 0 else 1 + kept.index(parent)
            assert tree_parents[b][node] == expected < node
        # Each slot's bits are the root, its own and those of the slots above it.
        for level, frontier in enumerate(history[:-1]):
            for i in range(width):
                slot, on = 1 + level * width + i, 0
                seen = {0, slot}
                on = int(expanded[b, slot]) // width
                while on > 0:
                    seen.add(on)
                    on = int(expanded[b, on]) // width
                bits = frontier.ancestors[b, i].tolist()
                found = {
                    64 * w + j for w, word in enumerate(bits) for j in range(64) if word >> j & 1
                }
                assert found == seen


def test_confidence_is_the_product_along_the_path():
    tokens = torch.empty((1, 6), dtype=torch.int32)
    confidence, expanded = torch.empty(1, 6), torch.empty((1, 3), dtype=torch.int32)
    first = torch.tensor([[[7, 8]]], dtype=torch.int32)
    scores = torch.tensor([[[math.log(0.75), math.log(0.25)]]])
    frontier = grow_level(first, scores, None, 0, tokens, confidence, expanded, 1)
    assert frontier.tokens.tolist() == [[7, 8]]
    second = torch.tensor([[[1, 2], [3, 4]]], dtype=torch.int32)
    scores = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]))
    args = (second, scores, frontier.ancestors, 1, tokens, confidence, expanded, None)
    assert grow_level(*args) is None
    expected = [0.75, 0.25, 0.375, 0.375, 0.225, 0.025]
    assert torch.allclose(confidence[0].exp(), torch.tensor(expected))
    roots = torch.tensor([9], dtype=torch.int32)
    tree = grow_tree(roots, tokens, confidence, expanded, 2, 5)
    assert tree.tokens.tolist() == [[9, 7, 1, 2, 8]]
    assert tree.parents.tolist() == [[-1, 0, 1, 1, 0]]
    sure = torch.tensor([[1.0, 0.75, 0.375, 0.375, 0.25]])
    assert torch.allclose(tree.confidence.exp(), sure)


def paths_by_hand(drawn, scores, nodes):
    """All paths of ranks of one sequence, the surest first: ranks and log confidences."""
    own = torch.log_softmax(scores.double(), dim=-1)
    paths, level = [], [((), 0.0)]
    for depth in range(drawn.shape[0]):
        level = [
            ((*ranks, rank), sure + float(own[depth, rank]))
            for ranks, sure in level
            for rank in range(drawn.shape[1])
            if drawn[depth, rank] >= 0
        ]
        paths += level
    return sorted(paths, key=lambda path: (-path[1], len(path[0])))[: nodes - 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 3]),
    width=st.sampled_from([1, 2, 5, 16]),
    depth=st.integers(1, 4),
    nodes=st.sampled_from([1, 2, 3, 8, 32]),
    missing=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_a_tree_of_offsets_has_the_surest_paths(seed, batch, width, depth, nodes, missing, threads):
    _C.set_num_threads(threads)
    rng = torch.Generator().manual_seed(seed)
    nodes = min(nodes, sum(width**d for d in range(depth + 1)))
    scores = (4 * torch.randn((batch, depth, width), generator=rng)).sort(-1, True).values
    drawn = torch.randint(0, 50, (batch, depth, width), generator=rng, dtype=torch.int32)
    if missing:
        cut = torch.randint(1, width + 1, (batch, depth, 1), generator=rng)
        drawn = drawn.masked_fill(torch.arange(width) >= cut, -1)
    scores = scores.masked_fill(drawn < 0, -torch.inf)
    roots = torch.arange(100, 100 + batch, dtype=torch.int32)
    ours = grow_offsets(roots, drawn, scores, nodes)
    for tree in (ours, TORCH.call(grow_offsets, roots, drawn, scores, nodes)):
        tokens, parents, confidence = tree
        assert tokens.shape == parents.shape == confidence.shape == (batch, nodes)
        for b in range(batch):
            wanted = paths_by_hand(drawn[b], scores[b], nodes)
            assert (int(tokens[b, 0]), int(parents[b, 0])) == (100 + b, -1)
            sure = [0.0, *(path for _, path in wanted)]
            assert confidence[b, : len(sure)].tolist() == pytest.approx(sure, abs=1e-4)
            assert all(c < -1e20 for c in confidence[b, len(sure) :].tolist())
            number = {(): 0} | {ranks: i for i, (ranks, _) in enumerate(wanted, start=1)}
            for node, (ranks, _) in enumerate(wanted, start=1):
                assert int(tokens[b, node]) == int(drawn[b, len(ranks) - 1, ranks[-1]])
                assert int(parents[b, node]) == number[ranks[:-1]]
            for node in range(1 + len(wanted), nodes):  # what fills the tree up
                assert 0 <= int(parents[b, node]) < node
                assert int(tokens[b, node]) >= 0


def test_shapes_that_do_not_fit_are_named():
    tokens = torch.empty((1, 6), dtype=torch.int32)
    confidence, expanded = torch.empty(1, 6), torch.empty((1, 3), dtype=torch.int32)
    drawn = torch.zeros((1, 2, 2), dtype=torch.int32)
    with pytest.raises(ValueError, match="drawn has shape"):
        grow_level(drawn, torch.zeros(1, 2, 2), None, 0, tokens, confidence, expanded, 1)
    with pytest.raises(ValueError, match="tree_tokens has shape"):
        grow_tree(torch.zeros(1, dtype=torch.int32), tokens, confidence, expanded, 2, 8)
    with pytest.raises(ValueError, match="no more than 7 paths"):
        grow_offsets(torch.zeros(1, dtype=torch.int32), drawn, torch.zeros(1, 2, 2), 8)
