"""How many rows a forward of ragged trees is computed with."""

from __future__ import annotations

# Packing a batch's rows costs a forward of the bundled target what three rows and a twentieth of
# all rows cost: with so much padding, an eighth of the rows at least, it is a gain.
LEAST_PADDING = 8


def rows_run(padded: int, real: int, packs: bool) -> int:
    """Of ``padded`` rows, ``real`` of which are nodes: padding is left out where that is a gain.

    Args:
        packs: whether it ever is, see `inferlab.models.packing`.
    """
    return real if packs and padded - real >= max(LEAST_PADDING, padded // 8) else padded
