"""What restricts the new tokens of a request, as the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class NodeMasks(NamedTuple):
    """What may follow the nodes of one draft tree.

    Attributes:
        nodes: those of which it was asked; behind the others the text has ended, or does not come.
        bits: [len(nodes), ceil(vocab / 8)]; bit t % 8 of byte t // 8: token t may follow.
        reachable: [N], whether the path from the root to each node is allowed.
    """

    nodes: list[int]
    bits: NDArray[np.uint8]
    reachable: NDArray[np.bool_]


class Constraint(Protocol):
    """Says which tokens may follow the new ones of one request, which it alone holds.

    Its state follows from the tokens that it has taken in. What it raises ends its request.

    Attributes:
        num_tokens: how many new tokens it has taken in.
        is_complete: whether the text is whole, and nothing may follow.
    """

    @property
    def num_tokens(self) -> int: ...

    @property
    def is_complete(self) -> bool: ...

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes in new tokens."""

    def masks(self, tokens: Sequence[int], parents: Sequence[int]) -> NodeMasks:
        """What may follow the nodes of a tree whose root is the newest token.

        Args:
            tokens: [N] of the nodes; the root's is not looked at.
            parents: [N], of each node one before it; -1 of the root, -2 of padding.
        """

    def may_end(self) -> bool | None:
        """Where no token may follow but end tokens: whether the text may end. None elsewhere."""
