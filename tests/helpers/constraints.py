"""A constraint that is a function in Python: slow, obvious, and as a test wants it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from inferlab.scheduler import NodeMasks


class Rule:
    """Allows behind new tokens what a function of them says.

    Args:
        allowed: from the new tokens to those that may follow; raises where it likes.
        vocab_size: of the target.
        length: the text is complete behind so many tokens.
        ends: end tokens, which may come wherever ``allowed`` says so.
    """

    def __init__(
        self,
        allowed: Callable[[list[int]], Collection[int]],
        vocab_size: int,
        length: int | None = None,
        ends: Collection[int] = (),
    ) -> None:
        self.allowed = allowed
        self.vocab_size = vocab_size
        self.length = length
        self.ends = ends
        self.tokens: list[int] = []

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def is_complete(self) -> bool:
        return len(self.tokens) == self.length

    def advance(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            assert token in self.allowed(self.tokens)
            self.tokens.append(token)

    def masks(self, tokens: Sequence[int], parents: Sequence[int]) -> NodeMasks:
        assert all(p < n for n, p in enumerate(parents))
        paths: dict[int, list[int]] = {0: list(self.tokens)}
        rows = {}
        reachable = np.zeros(len(tokens), dtype=np.bool_)
        for node, parent in enumerate(parents):
            if node > 0 and (parent not in rows or not rows[parent][tokens[node]]):
                continue
            reachable[node] = True
            if node > 0:
                paths[node] = [*paths[parent], tokens[node]]
                if tokens[node] in self.ends:
                    continue
            rows[node] = np.zeros(self.vocab_size, dtype=np.bool_)
            rows[node][list(self.allowed(paths[node]))] = True
        bits = np.packbits(np.stack(list(rows.values())), axis=1, bitorder="little")
        return NodeMasks(list(rows), bits, reachable)

    def may_end(self) -> bool | None:
        open_ = set(self.allowed(self.tokens)) - set(self.ends)
        return None if open_ else self.is_complete
