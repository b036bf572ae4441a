"""Server-sent events: the event stream of the HTML standard, read from bytes as they come."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_LINE_END = re.compile(rb"\r\n|\r|\n")


class Event(NamedTuple):
    """One event: its ``data`` lines joined by LF, and its ``type``, "message" where none is named.

    ``id`` and ``retry`` are for clients that connect again, which no completion survives.
    """

    data: str
    type: str = "message"


class EventParser:
    """An event stream, fed as it comes; each event is out as soon as its empty line is in.

    By https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream:
    UTF-8, a byte-order mark in front is no text; lines end at CR LF, LF or CR and at nothing else
    (JSON may hold a raw U+2028); a line that begins with a colon is a comment; a block without a
    ``data`` field is no event. An event with empty data is one: most readers pass over it.

    Args:
        errors: what becomes of bytes that are no UTF-8: "replace", as the standard has it, or
            "strict".
    """

    def __init__(self, errors: str = "replace") -> None:
        self._errors = errors
        self._rest = b""
        self._after_cr = False
        self._first = True
        self._data: list[str] = []
        self._kind = ""

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that end in ``chunk``; to be read to the end before the next chunk.

        Raises:
            UnicodeDecodeError: a line that is no UTF-8, where ``errors`` is "strict".
        """
        if self._after_cr and chunk:  # a CR ends its line at once, an LF right behind it is skipped
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        if not chunk:
            return
        text = self._rest + chunk
        *lines, self._rest = _LINE_END.split(text) if b"\r" in text else text.split(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        for line in lines:
            if line:
                self._take(line)
                continue
            self._first = False
            if self._data:
                yield self._event()
            self._data, self._kind = [], ""

    def finish(self) -> Event | None:
        """The end of the stream: a last event whose empty line never came, where there is one."""
        if self._rest:
            self._take(self._rest)
        return self._event() if self._data else None

    def _take(self, line: bytes) -> None:
        if self._first:
            line = line.removeprefix(codecs.BOM_UTF8)
            self._first = False
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", self._errors))
        elif field == b"event":
            self._kind = value.removeprefix(b" ").decode("utf-8", self._errors)

    def _event(self) -> Event:
        data = self._data
        return Event(data[0] if len(data) == 1 else "\n".join(data), self._kind or "message")


def parse_events(chunks: Iterable[bytes], *, keep_unfinished: bool = False) -> Iterator[Event]:
    """The events of a stream that is cut anywhere; see `EventParser`.

    Args:
        keep_unfinished: also yield a last event whose empty line never came, which the standard
            drops: there are servers that leave it out.
    """
    parser = EventParser()
    for chunk in chunks:
        yield from parser.feed(chunk)
    last = parser.finish()
    if keep_unfinished and last is not None:
        yield last
