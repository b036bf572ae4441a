"""The page allocator: which pages of the K/V pool are free. Knows numbers, not tensors."""

from __future__ import annotations


class PageAllocator:
    """Hands out page ids in [0, num_pages), most recently freed first (still warm in the cache)."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; it must be >= 1")
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"page_size is {page_size}; it must be a power of two")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """``count`` page ids. Raises RuntimeError with the number needed if there are too few."""
        if count > len(self._free):
            raise RuntimeError(
                f"no K/V pages left: {count} needed, {len(self._free)} of {self.num_pages} free"
            )
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def release(self, pages: list[int]) -> None:
        """Gives pages back. Raises ValueError if one of them is not allocated."""
        free = set(self._free)
        for page in pages:
            if page in free or not 0 <= page < self.num_pages:
                raise ValueError(f"page {page} is released, but it is not allocated")
        self._free.extend(reversed(pages))
