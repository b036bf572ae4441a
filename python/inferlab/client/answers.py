"""What an OpenAI-compatible server answered: one JSON body, or a stream of server-sent events."""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

from inferlab.client.sse import parse_events

KEEP_ALIVE = ("ping", "heartbeat", "keepalive", "keep-alive")
"""Types of events that servers send so that the connection stays open."""

FAILED = ("error", "abort")
"""Finish reasons by which servers say that they failed, whatever came before."""

_ERROR_CHARS = 500


class AnswerError(Exception):
    """The server answered, but not with a completion; the text says what is wrong with it."""


@dataclass
class Answer:
    """A completion.

    Attributes:
        completion_tokens, prompt_tokens: from the server's ``usage``, None where it sends none.
        text_times: where a stream was asked for: ``clock()`` at each chunk that carried text.
            Chunks with a role, a finish reason or usage alone are no tokens and have no time here.
        streamed: it came as a stream.
    """

    text: str
    finish_reason: str | None
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    raw: dict[str, Any]
    text_times: list[float] = field(default_factory=list)
    streamed: bool = False


def read_answer(body: bytes) -> Answer:
    """Reads the body of a chat or text completion.

    ``null`` is the same as a key left out. An empty text is an answer where the server says that it
    is finished.

    Raises:
        AnswerError: broken JSON, an error object, no choice, or neither text nor an end.
    """
    content = read_json(body, "the answer")
    choice = first_choice(content, "the answer")
    if choice is None:
        raise AnswerError("the answer has no choices: " + shorten(body))
    piece = piece_of(choice)
    answer = Answer(
        text=join_texts([piece.text]),
        finish_reason=text_or_none(choice.get("finish_reason")),
        model=text_or_none(content.get("model")),
        prompt_tokens=usage_count(content, "prompt_tokens"),
        completion_tokens=usage_count(content, "completion_tokens"),
        raw=content,
    )
    _require_end(answer, thought=piece.thought)
    return answer


def read_stream(chunks: Iterable[bytes], clock: Callable[[], float] = time.perf_counter) -> Answer:
    """Reads a streamed completion; ``raw`` of the answer is the body it would have been unstreamed.

    Events that keep the connection alive (empty data, or a type of KEEP_ALIVE) carry nothing; what
    follows ``[DONE]`` is not read. A server that answers with one JSON body instead of a stream has
    answered, too: its text came as a whole, at one time.

    Raises:
        AnswerError: an error event (also behind text that already came), broken JSON, neither text
            nor an end, or a stream that ends without a finish reason and without ``[DONE]``.
    """
    chunks, is_stream = _look_ahead(chunks)
    if not is_stream:
        answer = read_answer(b"".join(chunks))
        return replace(answer, text_times=[clock()] if answer.text else [])
    head: dict[str, Any] = {}
    texts: list[str] = []
    times: list[float] = []
    usage: dict[str, Any] = {}
    finish_reason: str | None = None
    chat = done = thought = False
    for data, kind in parse_events(chunks, keep_unfinished=True):
        if data.strip() == "[DONE]":
            done = True
            break
        if not data.strip() or kind in KEEP_ALIVE:
            continue
        if kind == "error":
            raise AnswerError("the server reports an error: " + error_text(data))
        content = read_json(data, "a streamed chunk")
        head = head or content
        if isinstance(content.get("usage"), dict):
            usage = content["usage"]
        choice = first_choice(content, "a streamed chunk")
        if choice is None:
            continue
        piece = piece_of(choice)
        chat = chat or piece.chat
        thought = thought or piece.thought
        if piece.text:
            texts.append(piece.text)
        if piece.text or piece.thought:
            times.append(clock())
        finish_reason = text_or_none(choice.get("finish_reason")) or finish_reason
    if not done and finish_reason is None:
        raise AnswerError(
            f"the stream ended early, after {len(texts)} chunks of text: "
            "neither a finish reason nor [DONE] came"
        )
    full = join_texts(texts)
    body: dict[str, Any] = {"message": {"role": "assistant", "content": full}}
    choice = {"index": 0, "finish_reason": finish_reason, **(body if chat else {"text": full})}
    raw: dict[str, Any] = {
        key: head[key] for key in ("id", "object", "created", "model") if key in head
    }
    raw.update(choices=[choice], **({"usage": usage} if usage else {}))
    answer = Answer(
        text=full,
        finish_reason=finish_reason,
        model=text_or_none(head.get("model")),
        prompt_tokens=usage_count(raw, "prompt_tokens"),
        completion_tokens=usage_count(raw, "completion_tokens"),
        raw=raw,
        text_times=times,
        streamed=True,
    )
    _require_end(answer, thought=thought)
    return answer


def read_models(body: bytes) -> dict[str, Any]:
    """Reads the body of ``/v1/models``; each entry of its ``data`` has a textual ``id``.

    Raises:
        AnswerError: broken JSON, an error object, or another shape.
    """
    listed = read_json(body, "the list of models")
    entries = listed.get("data")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in entries
    ):
        raise AnswerError("the list of models has an unknown shape: no data[].id")
    return listed


def read_json(data: bytes | str, what: str) -> dict[str, Any]:
    """The JSON object in ``data``.

    Raises:
        AnswerError: empty, broken, not an object, or an error object under status 200:
            ``{"error": ...}`` or ``{"object": "error", ...}``.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        if not data.strip():
            raise AnswerError(f"{what} is empty") from None
        raise AnswerError(f"{what} is not JSON ({error}): {shorten(data)}") from None
    if not isinstance(content, dict):
        raise AnswerError(f"{what} is not a JSON object: {shorten(data)}")
    if content.get("error") or content.get("object") == "error":
        raise AnswerError("the server reports an error: " + error_text(data))
    return content


def error_text(body: bytes | str) -> str:
    """The message of an error body, in the shapes that servers use; else the body itself."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return shorten(body)
    if isinstance(content, dict):
        for key in ("error", "message", "detail"):
            value = content.get(key)
            if isinstance(value, dict) and isinstance(value.get("message"), str):
                return shorten(value["message"])
            if isinstance(value, str) and value:
                return shorten(value)
    return shorten(body)


def shorten(body: bytes | str) -> str:
    """The body as one line of text that can be encoded, cut."""
    text = join_texts([body]) if isinstance(body, str) else body.decode("utf-8", "replace")
    text = " ".join(text.split())
    return text if len(text) <= _ERROR_CHARS else text[:_ERROR_CHARS] + "..."


def join_texts(texts: Iterable[str]) -> str:
    """The texts as one; halves of a surrogate pair meet, one without its other half is U+FFFD.

    JSON escapes may tear such a pair apart, and a token may end between its halves.
    """
    text = "".join(texts)
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _look_ahead(chunks: Iterable[bytes]) -> tuple[Iterator[bytes], bool]:
    """The chunks, and whether they are an event stream: no field of one begins with a brace."""
    rest = iter(chunks)
    start = b""
    for chunk in rest:
        start += chunk
        if start.removeprefix(codecs.BOM_UTF8).strip():
            break
    is_stream = not start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
    return chain([start], rest), is_stream


class Piece(NamedTuple):
    """What a choice carries: a whole message, or one chunk of it."""

    text: str
    thought: bool
    """Whether a reasoning model's hidden text is in it."""
    chat: bool


def piece_of(choice: Mapping[str, Any]) -> Piece:
    """Of a chat (``message``, streamed ``delta``) or a text completion (``text``).

    ``content`` is a text, or a list of parts such as ``{"type": "text", "text": ...}``.
    """
    message = choice.get("delta") or choice.get("message")
    chat = isinstance(choice.get("delta"), dict) or isinstance(message, dict)
    if not isinstance(message, dict):
        message = {}
    thought = bool(message.get("reasoning_content") or message.get("reasoning"))
    content = message.get("content") or choice.get("text")
    if not isinstance(content, list):
        return Piece(content if isinstance(content, str) else "", thought, chat)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            texts.append(text)
        thought = thought or (isinstance(part, dict) and bool(part.get("thinking")))
    return Piece("".join(texts), thought, chat)


def first_choice(content: dict[str, Any], what: str) -> dict[str, Any] | None:
    """The choice of index 0, which one that names none has; None: it is of others, or has none."""
    choices = content.get("choices")
    if not choices:
        return None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise AnswerError(f"{what} has choices of an unknown shape: {shorten(str(choices))}")
    return next((choice for choice in choices if not choice.get("index")), None)


def _require_end(answer: Answer, *, thought: bool) -> None:
    """Refuses an answer that the server says is none, and one without text, unless the server says
    that it ends there."""
    if answer.finish_reason in FAILED:
        raise AnswerError(f"the server gave up (finish_reason {answer.finish_reason!r})")
    cut_short = thought and answer.finish_reason == "length"
    if answer.text or (answer.finish_reason and not cut_short):
        return
    why = "only reasoning came, raise max_tokens; " if thought else ""
    raise AnswerError(f"the answer is empty ({why}finish_reason {answer.finish_reason!r})")


def usage_count(content: dict[str, Any], key: str) -> int | None:
    usage = content.get("usage")
    value = usage.get(key) if isinstance(usage, dict) else None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return None
    return value


def text_or_none(value: object) -> str | None:
    return join_texts([value]) if isinstance(value, str) else None
