"""Server-sent events against the examples of the HTML standard, cut at every byte."""

from __future__ import annotations

import pytest

from inferlab.client.sse import Event, parse_events

# https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
STANDARD = {
    "two lines of data": ("data: YHOO\ndata: +2\ndata: 10\n\n", [Event("YHOO\n+2\n10")]),
    "types": (
        "event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n",
        [Event("73857293", "add"), Event("2153", "remove")],
    ),
    "comment, ids, one blank stripped of two": (
        ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
        "data:  third event\n\n",
        [Event("first event"), Event("second event"), Event(" third event")],
    ),
    "empty data, a newline, and an unfinished block": (
        "data\n\ndata\ndata\n\ndata:",
        [Event(""), Event("\n")],
    ),
    "identical events": ("data:test\n\ndata: test\n\n", [Event("test"), Event("test")]),
}
OWN = {
    "byte-order mark": ("\ufeffdata: x\n\n\ufeffdata: y\n\n", [Event("x")]),
    "colons in data": ("data: a:b: c\n\n", [Event("a:b: c")]),
    "other line separators are text": (
        "data: a\u2028b\x0bc\x85d\U0001f30d\n\n",
        [Event("a\u2028b\x0bc\x85d\U0001f30d")],
    ),
    "unknown fields": ("datum: x\nDATA: y\n data: z\ndata: w\n\n", [Event("w")]),
    "the type ends with its event": (
        "event: a\ndata: x\n\nevent: b\n\ndata: y\n\n",
        [Event("x", "a"), Event("y")],
    ),
    "retry": ("retry: 10\n\ndata: x\nretry: ten\n\n", [Event("x")]),
}
CASES = STANDARD | OWN


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("name", CASES)
def test_every_split_gives_the_same_events(name, end):
    text, expected = CASES[name]
    stream = text.replace("\n", end).encode()
    for at in range(len(stream) + 1):
        assert list(parse_events([stream[:at], b"", stream[at:]])) == expected, at
    assert list(parse_events(stream[i : i + 1] for i in range(len(stream)))) == expected


def test_mixed_line_ends():
    assert list(parse_events([b"data: a\rdata: b\r\ndata: c\n\r"])) == [Event("a\nb\nc")]
    assert list(parse_events([b"data: a\n\r\ndata: b\r\r\n"])) == [Event("a"), Event("b")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_an_event_is_there_as_soon_as_its_empty_line_is(end):
    seen: list[str] = []

    def chunks():
        yield b"data: x" + end + end
        seen.append("next chunk")
        yield b"data: y" + end + end

    for event in parse_events(chunks()):
        seen.append(event.data)
    assert seen == ["x", "next chunk", "y"]


def test_bytes_that_are_no_utf8_are_replaced():
    assert list(parse_events([b"data: a\xffb\n\n"])) == [Event("a\ufffdb")]


def test_an_unfinished_event_is_kept_on_request():
    stream = b"data: x\n\nevent: e\ndata: y"
    assert list(parse_events([stream])) == [Event("x")]
    assert list(parse_events([stream], keep_unfinished=True)) == [Event("x"), Event("y", "e")]
