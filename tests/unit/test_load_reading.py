"""A stream as it comes off the socket, cut anywhere: its texts, times, tokens and faults."""

from __future__ import annotations

import json

import pytest

from inferlab.load.reading import Reading, names_model


def event(content: object, *, finish: str | None = None, **more: object) -> bytes:
    delta = content if isinstance(content, dict) else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **more.pop("choice", {})}
    body = {"model": "m", "choices": [choice], **more}
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def usage(tokens: int) -> dict:
    return {"usage": {"prompt_tokens": 2, "completion_tokens": tokens}}


END = b"data: " + json.dumps({"choices": [], **usage(3)}).encode() + b"\n\ndata: [DONE]\n\n"


def read(*chunks: bytes) -> Reading:
    """The n-th chunk came at n."""
    reading = Reading()
    for stamp, chunk in enumerate(chunks, start=1):
        reading.feed(chunk, stamp)
    reading.finish()
    return reading


def test_times_are_those_of_chunks_with_text():
    found = read(
        event({"role": "assistant", "content": ""}), event("a"), event("b", finish="stop"), END
    )
    assert (found.text, found.text_ns, found.first_content_ns) == ("ab", [2, 3], 2)
    assert (found.finish_reason, found.model, found.usage["completion_tokens"]) == ("stop", "m", 3)
    assert (found.done, found.failure, found.warnings, found.last_ns) == (True, None, [], 4)


def test_reasoning_is_a_token_and_no_content():
    found = read(event({"reasoning_content": "hm"}), event("a", finish="stop"), END)
    assert (found.text, found.text_ns, found.first_content_ns) == ("a", [1, 2], 2)


def test_every_split_reads_the_same():
    texts = ("a\u00e9\U0001f30d", "\u4e16")
    raw = event(texts[0]) + event(texts[1], finish="stop") + END
    for at in range(len(raw) + 1):
        found = read(raw[:at], raw[at:])
        assert (found.text, found.failure, found.done) == ("".join(texts), None, True), at
        assert len(found.text_ns) == 2


def test_several_events_of_one_read_have_its_time():
    assert read(event("a") + event("b") + event("c", finish="stop") + END).text_ns == [1, 1, 1]


@pytest.mark.parametrize(
    "told",
    [
        lambda total, new: usage(total),
        lambda total, new: {"choice": {"token_ids": list(range(new))}},
        lambda total, new: {"choice": {"logprobs": {"content": [{}] * new}}},
        lambda total, new: {"choice": {"logprobs": {"tokens": ["x"] * new}}},
    ],
)
def test_tokens_of_chunks_where_they_are_told(told):
    found = read(
        event({"role": "assistant"}, **told(0, 0)),
        event("a", **told(2, 2)),
        event("", **told(3, 1)),  # half of a character: counts in the next chunk
        event("b", **told(6, 3), finish="stop"),
        END,
    )
    assert found.chunk_tokens == [2, 4]


def test_tokens_of_chunks_are_not_guessed():
    assert read(event("a"), event("b", finish="stop"), END).chunk_tokens is None
    mixed = read(event("a", **usage(1)), event("b", finish="stop"), END)
    assert mixed.chunk_tokens is None


def test_one_json_body_is_an_answer():
    message = {"choices": [{"message": {"content": "ab"}, "finish_reason": "stop"}], **usage(2)}
    body = json.dumps(message).encode()
    found = read(body[:9], body[9:])
    assert (found.text, found.text_ns, found.failure) == ("ab", [2], None)
    assert found.warnings == ["not_streamed"]
    assert found.chunk_tokens is None


def test_warnings():
    assert read(event("a", finish="stop"), b"data: [DONE]\n\n").warnings == ["missing_usage"]
    assert read(event("a", finish="stop"), END.split(b"\n\n")[0] + b"\n\n").warnings == ["no_done"]
    assert read(event("a"), END).warnings == ["no_finish_reason"]


@pytest.mark.parametrize(
    ("chunks", "kind"),
    [
        ([event("a")], "truncated"),
        ([event("a")[:-9]], "truncated"),
        (
            [event("a"), b'data: {"model": "m", "choices": []}\n\ndata: {"model": "n"}\n\n'],
            "wrong_model",
        ),
        ([b"data: {oops\n\n"], "malformed_json"),
        ([b"data: [1]\n\n"], "malformed_json"),
        ([b'data: {"choices": 3}\n\n'], "malformed_json"),
        ([b"{oops"], "malformed_json"),
        ([b'{"choices": []}'], "malformed_json"),
        ([event("a"), b'data: {"error": {"message": "full"}}\n\n'], "error_event"),
        ([event("a"), b'event: error\ndata: {"message": "full"}\n\n'], "error_event"),
        ([b'{"error": {"message": "full"}}'], "error_event"),
        ([event("a"), b'data: {"choices": [{"text": "\xff"}]}\n\n'], "bad_utf8"),
        ([event("a"), b"data: \xe4\xb8"], "bad_utf8"),
        ([b'{"\xff": 1}'], "bad_utf8"),
        ([event("a"), event("", finish="error"), b"data: [DONE]\n\n"], "error_event"),
        ([event("a", finish="abort"), b"data: [DONE]\n\n"], "error_event"),
        ([b"data: [DONE]\n\n"], "empty"),
        ([b""], "truncated"),
    ],
)
def test_faults(chunks, kind):
    found = read(*chunks)
    assert found.failure is not None
    assert found.failure.kind == kind
    if chunks[0] == event("a"):
        assert found.text == "a", "what came before is kept"


def test_other_choices_are_not_read():
    found = read(
        event("a"),
        event("X", choice={"index": 1}),
        event("b", finish="stop"),
        event("Y", finish="length", choice={"index": 1}),
        END,
    )
    assert (found.text, found.text_ns, found.finish_reason) == ("ab", [1, 3], "stop")


def test_usage_that_cannot_be_is_none():
    for odd in (True, -1, 2.0, "3", 0):
        end = b"data: " + json.dumps({"choices": [], **usage(odd)}).encode() + b"\n\n"
        found = read(event("a", finish="stop"), end, b"data: [DONE]\n\n")
        assert (found.completion_tokens, found.warnings) == (None, ["missing_usage"]), odd


def test_usage_that_differs_from_the_chunks_is_told():
    def warned(counted):
        ids = {"choice": {"token_ids": [1, 2]}}
        end = b"data: " + json.dumps({"choices": [], **usage(counted)}).encode() + b"\n\n"
        chunks = event("a", **ids), event("b", finish="stop", **ids)
        return read(*chunks, end, b"data: [DONE]\n\n").warnings

    assert warned(4) == warned(5) == []  # the end of the text is a token without one
    assert warned(100) == warned(2) == ["usage_differs"]


def test_what_is_behind_the_end_is_not_read():
    found = read(event("a", finish="stop"), b"data: [DONE]\n\ndata: {oops\n\n", b"\xff")
    assert found.failure is None


def test_keep_alives_carry_nothing():
    found = read(
        b": wait\n\n", b"event: ping\ndata: {}\n\n", b"data:\n\n", event("a", finish="stop"), END
    )
    assert (found.text_ns, found.failure) == ([4], None)


def test_the_last_events_are_kept_for_what_they_tell():
    found = read(event("a"), event("b", finish="stop", metrics={"x": 1}), END)
    assert [("metrics" in event) for event in found.events] == [True, False]


@pytest.mark.parametrize(
    ("answered", "asked", "same"),
    [("m", "m", True), ("m-2026-01-01", "m", True), ("m@main", "m", True), (None, "m", True),
     ("m", None, True), ("n", "m", False), ("mm", "m", False)],
)  # fmt: skip
def test_which_model_answered(answered, asked, same):
    assert names_model(answered, asked) is same
