"""Server-sent events: the event stream of the HTML standard, read from bytes as they come."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_LINE_END = re.compile(r"\r\n|\r|\n")


class Event(NamedTuple):
    """One event: its ``data`` lines joined by LF, and its ``type``, "message" where none is named.

    ``id`` and ``retry`` are for clients that connect again, which no completion survives.
    """

    data: str
    type: str = "message"


def parse_events(chunks: Iterable[bytes], *, keep_unfinished: bool = False) -> Iterator[Event]:
    """The events of a stream, each as soon as its empty line is there.

    By https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream:
    UTF-8, a byte-order mark in front is no text; lines end at CR LF, LF or CR and at nothing else
    (JSON may hold a raw U+2028); a line that begins with a colon is a comment; a block without a
    ``data`` field is no event. An event with empty data is one: most readers pass over it.

    Args:
        chunks: the bytes, cut anywhere.
        keep_unfinished: also yield a last event whose empty line never came, which the standard
            drops: there are servers that leave it out.
    """
    data: list[str] = []
    kind = ""
    for line in _lines(chunks):
        if not line:
            if data:
                yield Event("\n".join(data), kind or "message")
            data, kind = [], ""
            continue
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        elif field == "event":
            kind = value.removeprefix(" ")
    if keep_unfinished and data:
        yield Event("\n".join(data), kind or "message")


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines without their ends; a CR ends its line at once, an LF right behind it is skipped."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    rest = ""
    after_cr = False
    for chunk in chunks:
        text = decoder.decode(chunk)
        if after_cr and text:
            text = text.removeprefix("\n")
            after_cr = False
        *lines, rest = _LINE_END.split(rest + text)
        after_cr = after_cr or text.endswith("\r")
        yield from lines
    rest += decoder.decode(b"", final=True)
    if rest:
        yield rest
