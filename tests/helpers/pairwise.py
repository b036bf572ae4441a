"""Fewer rows of a large matrix: every pair of values of two factors stands in one of them, or every
value.

The other rows of the full product are marked `full` (pytest -m full).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Row = tuple[int, ...]  # an index into each factor's values


def covering(sizes: Iterable[int], rows: Iterable[Row] = ()) -> list[Row]:
    """`rows`, and as many more as it takes for every pair of values of two factors."""
    sizes = list(sizes)
    chosen = list(dict.fromkeys(rows))
    missing = {pair for row in product(*map(range, sizes)) for pair in _pairs(row)}
    for row in chosen:
        missing -= _pairs(row)
    candidates = list(product(*map(range, sizes)))
    while missing:
        best = max(candidates, key=lambda row: len(_pairs(row) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(row: Row) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(row), 2))


def each_value(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """As few rows as it takes for every value of every factor, by their places."""
    values = [{(name, repr(value)) for name, value in row.items()} for row in rows]
    missing = set().union(*values)
    chosen = [] if missing else list(range(len(rows)))
    while missing:
        best = max(range(len(rows)), key=lambda i: len(values[i] & missing))
        chosen.append(best)
        missing -= values[best]
    return sorted(chosen)


def pairwise(
    always: Callable[..., bool] = lambda **row: False, **factors: Iterable[Any]
) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over the product of the factors.

    Arguments:
    always: whether a row, given as keywords, is to be among those that are not marked `full`.
    factors: each one's values, or a dict of them by the names that they have in a test's id.
    """
    columns = [
        list(values.items()) if isinstance(values, Mapping) else [(str(v), v) for v in values]
        for values in factors.values()
    ]
    rows = list(product(*(range(len(column)) for column in columns)))

    def values_of(row: Row) -> list[Any]:
        return [column[i][1] for column, i in zip(columns, row, strict=True)]

    kept = [row for row in rows if always(**dict(zip(factors, values_of(row), strict=True)))]
    few = set(covering(map(len, columns), kept))
    return pytest.mark.parametrize(
        tuple(factors),
        [
            pytest.param(
                *values_of(row),
                id="-".join(column[i][0] for column, i in zip(columns, row, strict=True)),
                marks=() if row in few else pytest.mark.full,
            )
            for row in rows
        ],
    )
