"""Names for the beginnings of texts, so that texts that begin alike share their pages."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from inferlab.scheduler.pages import Key

_BYTES = 16  # of a name: no two texts will ever meet by chance


class PrefixKeys:
    """The keys of a text's full pages, made as far as they are asked for.

    A page's key is a hash of its tokens and of the key of the page before it.

    Args:
        tokens: of the text, which may grow.
    """

    def __init__(self, tokens: Sequence[int], page_size: int) -> None:
        self._tokens = tokens
        self._page_size = page_size
        self._keys: list[Key] = []

    def first(self, count: int) -> list[Key]:
        """The keys of the first ``count`` pages, all of which must be full."""
        for page in range(len(self._keys), count):
            start = page * self._page_size
            tokens = array("q", self._tokens[start : start + self._page_size])
            before = self._keys[-1] if self._keys else b""
            digest = hashlib.blake2b(before + tokens.tobytes(), digest_size=_BYTES)
            self._keys.append(digest.digest())
        return self._keys[:count]
