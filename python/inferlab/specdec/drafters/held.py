"""What a drafter's own cache holds of pages that several texts share."""

from __future__ import annotations

from inferlab.scheduler import Request


class HeldPages:
    """Pages whose K/V a drafter has written as well, by when they were handed out: what another
    text wrote into a page that it got later is not what was held.

    Args:
        page_size: tokens of a page.
        looks_ahead: whether the K/V of a page depends on the token behind it, too.
    """

    def __init__(self, page_size: int, looks_ahead: bool = False) -> None:
        self._page_size = page_size
        self._looks_ahead = looks_ahead
        self._held: dict[int, tuple[int, int]] = {}  # page -> stamp, token behind it

    def add(self, request: Request, tokens: int) -> None:
        """The K/V of the first ``tokens`` tokens of a text is there."""
        for place in range(tokens // self._page_size):
            self._held[request.pages[place]] = self._mark(request, place)

    def count(self, request: Request) -> int:
        """Tokens at the beginning of a text, of those in shared pages, whose K/V is there."""
        place = 0
        while (place + 1) * self._page_size <= request.num_cached and self._held.get(
            request.pages[place]
        ) == self._mark(request, place):
            place += 1
        return place * self._page_size

    def _mark(self, request: Request, place: int) -> tuple[int, int]:
        behind = request.tokens[(place + 1) * self._page_size] if self._looks_ahead else -1
        return request.stamps[place], behind
