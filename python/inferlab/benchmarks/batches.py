"""Batches of prompts. Most are full: what a batch size costs is told by batches of that size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LEAST_GROUPS, MOST_GROUPS = 4, 16
"""Batches that are timed."""


def full_batches(prompts: Sequence[Any], size: int) -> list[list[Any]]:
    """Batches of ``size``, the last filled up from the first prompts."""
    count = len(prompts)
    return [
        [prompts[place % count] for place in range(first, first + size)]
        for first in range(0, count, size)
    ]


def batches_to_time(prompts: Sequence[Any], size: int) -> list[list[Any]]:
    """Batches of one size, some of them twice where there are too few to tell times from noise."""
    groups = full_batches(prompts, size)
    return (groups * -(-LEAST_GROUPS // len(groups)))[:MOST_GROUPS]


def mixed_batches(prompts: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Batches of all sizes, on about equally many prompts each, all prompts among them."""
    groups: list[list[Any]] = []
    place = 0
    for size in sorted(sizes, reverse=True):
        for _ in range(-(-len(prompts) // (size * len(sizes)))):
            groups.append([prompts[i % len(prompts)] for i in range(place, place + size)])
            place += size
    return groups


def groups_of(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """Each once, in batches of ``size``, the last of what is left."""
    return [indices[first : first + size] for first in range(0, len(indices), size)]
