"""How many rows a forward of ragged trees is computed with."""

from __future__ import annotations

from inferlab import _C


def rows_run(padded: int, real: int, packs: bool) -> int:
    """Of ``padded`` rows, ``real`` of which are nodes: padding is left out where that is a gain.

    Args:
        packs: whether it ever is, see `inferlab.models.packing`.
    """
    rows: int = _C.planner.rows_run(padded, real, packs)
    return rows
