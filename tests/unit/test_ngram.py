"""Prompt lookup: the index and the trees it makes."""

import random

import pytest

from inferlab.specdec.drafters import NgramDrafter, NgramIndex


def brute_force(tokens, k, branches, min_match, max_match):
    """The definition: longest suffix first, newest occurrence first, no duplicates."""
    found = []
    for n in range(max_match, min_match - 1, -1):
        suffix = tokens[len(tokens) - n :]
        if n > len(tokens):
            continue
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] != suffix:
                continue
            continuation = tokens[end : end + k]
            if not any(f[: len(continuation)] == continuation for f in found):
                found.append(continuation)
                if len(found) == branches:
                    return found
    return found


@pytest.mark.parametrize("branches", [1, 3])
def test_index_agrees_with_the_definition(branches):
    rng = random.Random(branches)
    tokens = []
    index = NgramIndex(1, 3)
    for _ in range(300):
        tokens += [rng.randrange(4) for _ in range(rng.randrange(1, 4))]
        index.extend(tokens)
        expected = brute_force(tokens, 5, branches, 1, 3)
        assert index.continuations(tokens, 5, branches) == expected


def test_nothing_is_proposed_where_nothing_repeats():
    index = NgramIndex(1, 4)
    tokens = list(range(20))
    index.extend(tokens)
    assert index.continuations(tokens, 4, 2) == []


@pytest.mark.parametrize(
    "kwargs", [{"min_match": 0}, {"min_match": 3, "max_match": 2}, {"branches": 0}]
)
def test_bad_settings_are_refused(kwargs):
    with pytest.raises(ValueError, match="ngram"):
        NgramDrafter(**kwargs)
