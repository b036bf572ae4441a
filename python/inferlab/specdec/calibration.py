"""How often a drafter's r-th best token at depth d is accepted: what optimal trees are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inferlab.models.assets import resolve_model_path
from inferlab.specdec.tree import TreeShape

FILE = "acceptance.json"
"""Beside the weights of a draft model or draft heads."""


class AcceptanceCounts:
    """Counts, over the walks through a static tree, which of a node's children was entered.

    Args:
        shape: the tree, all of it drafted in every step.
    """

    def __init__(self, shape: TreeShape) -> None:
        self._node_of_rank = {rank: node for node, rank in enumerate(shape.ranks)}
        self._shape = shape
        self._reached = [[0] * width for width in shape.widths]
        self._accepted = [[0] * width for width in shape.widths]
        children: dict[int, int] = {}
        for parent in shape.parents[1:]:
            children[parent] = children.get(parent, 0) + 1
        self._children = children

    def add(self, walk: Sequence[int]) -> None:
        """A walk, as the ranks of the nodes below the root."""
        node = 0
        for rank in (*walk, None):
            depth = self._shape.depths[node]
            for r in range(self._children.get(node, 0)):
                self._reached[depth][r] += 1
            if rank is None:
                break
            node = self._node_of_rank[rank]
            self._accepted[depth][self._shape.sibling_ranks[node]] += 1

    def rates(self) -> list[list[float]]:
        """By depth and rank; what was never reached is left out."""
        rates = []
        for accepted, reached in zip(self._accepted, self._reached, strict=True):
            row = [a / n for a, n in zip(accepted, reached, strict=True) if n >= 20]
            if not row:
                break
            rates.append(row)
        return rates


def write_acceptance(folder: Path, rates: list[list[float]], about: dict[str, Any]) -> None:
    """Puts the rates beside the weights in ``folder``, with what they were measured on."""
    rounded = [[round(rate, 4) for rate in row] for row in rates]
    text = json.dumps({"acceptance": rounded, **about}, indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def measured_acceptance(name: str) -> list[list[float]] | None:
    """The rates that lie beside the weights of a local or bundled draft; None without."""
    try:
        folder = resolve_model_path(name)
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(folder, Path) or not (folder / FILE).is_file():
        return None
    try:
        rates = json.loads((folder / FILE).read_text(encoding="utf-8"))["acceptance"]
        ok = rates and all(row and all(0 <= rate <= 1 for rate in row) for row in rates)
    except (json.JSONDecodeError, KeyError, TypeError):
        ok = False
    if not ok:
        raise ValueError(
            f"{folder / FILE}: must hold 'acceptance', a list by depth of lists of rates in "
            f"[0, 1]; measure it again or remove the file"
        )
    return [list(map(float, row)) for row in rates]
