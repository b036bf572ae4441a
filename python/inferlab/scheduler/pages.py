"""The page allocator: who uses which pages of the K/V pool, and what lies in those that nobody
uses. Knows numbers, not tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

Key = bytes
"""Names what a page holds: its tokens and all before them."""


class PageAllocator:
    """Hands out page ids in [0, num_pages).

    A page has as many users as took it, by `allocate` or `share`, and have not released it; it is
    free when the last one has. A free page that was published keeps what it holds until it is
    handed out for something else: empty ones go first, most recently freed first (still warm in
    the cache), then those that lie idle longest.

    Attributes:
        stamps: of each page, a number that it got when it was handed out last, and no other had.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; it must be >= 1")
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"page_size is {page_size}; it must be a power of two")
        self.num_pages = num_pages
        self.page_size = page_size
        self.stamps = [-1] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: dict[int, None] = {}  # free, published, in the order in which they became so
        self._users = [0] * num_pages
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._handed_out = 0

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def users(self, page: int) -> int:
        """How many hold a page."""
        return self._users[page]

    def allocate(self, count: int) -> list[int]:
        """``count`` page ids. Raises RuntimeError with the number needed if there are too few."""
        if count > self.num_free:
            raise RuntimeError(
                f"no K/V pages left: {count} needed, {self.num_free} of {self.num_pages} free"
            )
        taken = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._users[page] = 1
            self.stamps[page] = self._handed_out
            self._handed_out += 1
            taken.append(page)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more user for each page. Raises ValueError if one of them is not allocated."""
        self._check("shared", dict.fromkeys(pages, 1))
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One user fewer for each page. Raises ValueError, and releases none, if one of them is
        not allocated as often as it is released."""
        self._check("released", Counter(pages))
        for page in reversed(pages):  # the end of a text is of less use than its beginning
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, key: Key) -> None:
        """Says what a page holds, which stays as it is as long as it has users or is free; unless
        another page is known to hold the same."""
        self._check("published", {page: 1})
        if page not in self._key_of and key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def known(self, keys: Sequence[Key]) -> list[int]:
        """The pages that hold the first of these, up to one that none holds."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def num_idle(self, pages: Sequence[int]) -> int:
        """How many of these are free."""
        return sum(page in self._idle for page in pages)

    def reuse(self, pages: Sequence[int]) -> None:
        """One more user for each of these pages of `known`."""
        for page in pages:
            self._idle.pop(page, None)
            self._users[page] += 1

    def _evict(self) -> int:
        """A free page, whose content is forgotten."""
        page = next(iter(self._idle))
        del self._idle[page]
        del self._page_of[self._key_of.pop(page)]
        return page

    def _check(self, what: str, uses: Mapping[int, int]) -> None:
        for page, count in uses.items():
            if not 0 <= page < self.num_pages or self._users[page] < count:
                raise ValueError(f"page {page} is {what}, but it is not allocated")
