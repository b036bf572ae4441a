"""Static tree shapes: their numbering, their order of worth, and the best tree of a size."""

from __future__ import annotations

import itertools
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferlab.specdec.tree import Budget, TreeShape, ladder

RATES = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4).map(
    lambda row: sorted((x / (1 + sum(row)) for x in row), reverse=True)
)


def check_shape(shape: TreeShape) -> None:
    assert shape.parents[0] == -1
    assert all(0 <= p < n for n, p in enumerate(shape.parents) if n)
    assert list(shape.depths) == sorted(shape.depths), "not level by level"
    assert shape.ranks[0] == 0
    assert len(set(shape.ranks)) == shape.num_nodes
    # A parent is worth more than its children, an elder sibling more than a younger one.
    for node in range(1, shape.num_nodes):
        assert shape.ranks[shape.parents[node]] < shape.ranks[node]
    siblings: dict[int, list[int]] = {}
    for node in range(1, shape.num_nodes):
        siblings.setdefault(shape.parents[node], []).append(shape.ranks[node])
    assert all(ranks == sorted(ranks) for ranks in siblings.values())


def test_regular_shapes():
    shape = TreeShape.regular([3, 2, 1])
    check_shape(shape)
    assert shape.parents == (-1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9)
    assert shape.widths == (3, 2, 1)
    assert [list(level) for level in shape.levels][:2] == [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert shape.sibling_ranks[:10] == (0, 0, 1, 2, 0, 1, 0, 1, 0, 1)
    assert TreeShape.regular([1, 1, 1]) == TreeShape.chain(3)
    assert TreeShape.chain(3).is_chain
    assert not shape.is_chain


def test_shapes_that_are_too_large_are_refused():
    with pytest.raises(ValueError, match="more than the 256 nodes"):
        TreeShape.regular([16, 16])
    with pytest.raises(ValueError, match="every width must be >= 1"):
        TreeShape.regular([2, 0])
    with pytest.raises(ValueError, match="at most 256 are allowed"):
        TreeShape.chain(256)


def expected_tokens(parents: tuple[int, ...], rates: list[list[float]]) -> float:
    """Sum over the nodes below the root of the product of the rates along their paths."""
    values, depths, seen = [1.0], [0], {}
    for parent in parents[1:]:
        rank = seen.get(parent, 0)
        seen[parent] = rank + 1
        row = rates[min(depths[parent], len(rates) - 1)]
        values.append(values[parent] * row[rank])
        depths.append(depths[parent] + 1)
    return sum(values[1:])


def best_by_dynamic_programme(rates: list[list[float]], nodes: int, depth: int) -> float:
    """Sequoia's recursion: a node's tree of n nodes shares them out among its children by rank."""

    @lru_cache(None)
    def tree(level: int, n: int) -> float:  # best below a node at this level, n nodes to spend
        if level == depth or n == 0:
            return 0.0
        return forest(level, 0, n)

    @lru_cache(None)
    def forest(level: int, rank: int, n: int) -> float:  # children of rank and later
        row = rates[min(level, len(rates) - 1)]
        if rank == len(row) or n == 0:
            return 0.0
        options = [
            row[rank] * (1.0 + tree(level + 1, own - 1)) + forest(level, rank + 1, n - own)
            for own in range(1, n + 1)
        ]
        return max(options)

    return tree(0, nodes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rates=st.lists(RATES, min_size=1, max_size=3),
    nodes=st.integers(1, 12),
    depth=st.integers(1, 5),
)
def test_the_best_shape_is_the_dynamic_programmes(rates, nodes, depth):
    shape = TreeShape.best(rates, nodes, depth)
    check_shape(shape)
    assert shape.num_nodes <= nodes + 1
    assert shape.depth <= depth
    best = best_by_dynamic_programme(rates, nodes, depth)
    assert expected_tokens(shape.parents, rates) == pytest.approx(best)
    for fewer in range(1, shape.num_nodes - 1):
        part = shape.within(Budget(depth, fewer))
        check_shape_ranks(part, fewer)
        best = best_by_dynamic_programme(rates, fewer, depth)
        assert expected_tokens(part.parents, rates) == pytest.approx(best)


def check_shape_ranks(part: TreeShape, nodes: int) -> None:
    assert part.num_nodes == nodes + 1
    assert sorted(part.ranks) == list(range(nodes + 1)), "a part is a prefix of its family"


def test_fewer_levels_are_a_family_of_their_own():
    shape = TreeShape.regular([2, 2])
    part = shape.within(Budget(1, 255))
    assert part.parents == (-1, 0, 0)
    assert part.ranks == (0, 1, 2)
    assert shape.within(Budget(9, 255)) is shape


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rates=st.lists(RATES, min_size=1, max_size=3), nodes=st.integers(1, 30))
def test_a_budget_of_n_nodes_offers_the_first_n_ranks(rates, nodes):
    """At any number of levels: controllers read from a rank which budgets offer it."""
    shape = TreeShape.best(rates, nodes, 6)
    for levels in range(1, shape.depth + 1):
        whole = shape.within(Budget(levels, 255))
        for fewer in range(1, whole.num_nodes):
            part = shape.within(Budget(levels, fewer))
            check_shape(part)
            check_shape_ranks(part, fewer)
            assert whole.within(Budget(levels, fewer)) == part


def test_ladders_grow_to_the_whole():
    rungs = ladder(31, 6)
    sizes = [rung.nodes for rung in rungs]
    assert sizes[:4] == [1, 2, 3, 4]
    assert sizes[-1] == 31
    assert sizes == sorted(set(sizes))
    assert all(b <= a * 1.34 + 1 for a, b in itertools.pairwise(sizes))
    assert ladder(0, 4) == ()
