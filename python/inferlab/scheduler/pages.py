"""The page allocator: who uses which pages of the K/V pool. Knows numbers, not tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence


class PageAllocator:
    """Hands out page ids in [0, num_pages), most recently freed first (still warm in the cache).

    A page has as many users as took it, by `allocate` or `share`, and have not released it; it is
    free when the last one has.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; it must be >= 1")
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"page_size is {page_size}; it must be a power of two")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def users(self, page: int) -> int:
        """How many hold a page."""
        return self._users[page]

    def allocate(self, count: int) -> list[int]:
        """``count`` page ids. Raises RuntimeError with the number needed if there are too few."""
        if count > len(self._free):
            raise RuntimeError(
                f"no K/V pages left: {count} needed, {len(self._free)} of {self.num_pages} free"
            )
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        for page in taken:
            self._users[page] = 1
        return taken[::-1]

    def share(self, pages: Sequence[int]) -> None:
        """One more user for each page. Raises ValueError if one of them is not allocated."""
        self._check("shared", dict.fromkeys(pages, 1))
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One user fewer for each page. Raises ValueError, and releases none, if one of them is
        not allocated as often as it is released."""
        self._check("released", Counter(pages))
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)

    def _check(self, what: str, uses: Mapping[int, int]) -> None:
        for page, count in uses.items():
            if not 0 <= page < self.num_pages or self._users[page] < count:
                raise ValueError(f"page {page} is {what}, but it is not allocated")
