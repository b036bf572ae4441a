"""Which rows of a matrix are run by default."""

from itertools import combinations, product

import pytest

from helpers.pairwise import covering, pairwise


def pairs(rows):
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (2, 3, 3, 2, 3), (16, 2, 2, 2), (3, 5, 2, 2, 3)])
def test_every_pair_stands_in_a_row(sizes):
    everything = list(product(*map(range, sizes)))
    rows = covering(sizes)
    assert pairs(rows) == pairs(everything)
    largest = sorted(sizes)[-2:]
    if len(sizes) > 1:
        assert len(rows) <= 1.5 * largest[0] * largest[1]


def test_rows_that_must_be_there_count():
    rows = covering((2, 2, 2), [(1, 1, 1), (0, 0, 0)])
    assert rows[:2] == [(1, 1, 1), (0, 0, 0)]
    assert pairs(rows) == pairs(product(range(2), repeat=3))


def test_the_other_rows_are_marked():
    mark = pairwise(
        always=lambda a, b, c: (a, b, c) == ("x", 1, True),
        a=["x", "y"], b={"one": 1, "two": 2}, c=[False, True],
    )  # fmt: skip
    names, rows = mark.args
    assert names == ("a", "b", "c")
    assert [tuple(row.values) for row in rows] == list(product("xy", (1, 2), (False, True)))
    few = {row.id for row in rows if not row.marks}
    assert "x-one-True" in few
    assert 4 <= len(few) < 8
    assert all(mark.name == "full" for row in rows for mark in row.marks)
