"""What an OpenAI-compatible server answered: one JSON body, or a stream of server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

_ERROR_CHARS = 500


class AnswerError(Exception):
    """The server answered, but not with a completion; the text says what is wrong with it."""


@dataclass
class Answer:
    """A completion.

    Attributes:
        completion_tokens, prompt_tokens: from the server's ``usage``, None where it sends none.
        text_times: streamed answers only: ``clock()`` at each chunk that carried text. Chunks with
            a role, a finish reason or usage alone are no tokens and have no time here.
    """

    text: str
    finish_reason: str | None
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    raw: dict[str, Any]
    text_times: list[float] = field(default_factory=list)


def read_answer(body: bytes) -> Answer:
    """Reads the body of a chat or text completion.

    Raises:
        AnswerError: broken JSON, an error object, no choice, or no text.
    """
    content = read_json(body, "the answer")
    choice = _first_choice(content, "the answer")
    if choice is None:
        raise AnswerError("the answer has no choices: " + shorten(body))
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    answer = Answer(
        text=text if isinstance(text, str) else "",
        finish_reason=_text_or_none(choice.get("finish_reason")),
        model=_text_or_none(content.get("model")),
        prompt_tokens=_usage(content, "prompt_tokens"),
        completion_tokens=_usage(content, "completion_tokens"),
        raw=content,
    )
    _require_text(answer, thought=isinstance(message, dict) and bool(_thought(message)))
    return answer


def read_stream(chunks: Iterable[bytes], clock: Callable[[], float] = time.perf_counter) -> Answer:
    """Reads a streamed completion; ``raw`` of the answer is the body it would have been unstreamed.

    Raises:
        AnswerError: an error event (also behind text that already came), broken JSON, no text, or
            a stream that ends without a finish reason and without ``[DONE]``.
    """
    head: dict[str, Any] = {}
    texts: list[str] = []
    times: list[float] = []
    usage: dict[str, Any] = {}
    finish_reason: str | None = None
    chat = done = thought = False
    for name, data in _events(chunks):
        if data == b"[DONE]":
            done = True
            break
        if name == b"error":
            raise AnswerError("the server reports an error: " + error_text(data))
        content = read_json(data, "a streamed chunk")
        head = head or content
        if isinstance(content.get("usage"), dict):
            usage = content["usage"]
        choice = _first_choice(content, "a streamed chunk")
        if choice is None:
            continue
        delta = choice.get("delta")
        if isinstance(delta, dict):
            chat = True
            text = delta.get("content")
            if _thought(delta):
                thought = True
                times.append(clock())
        else:
            text = choice.get("text")
        if isinstance(text, str) and text:
            texts.append(text)
            times.append(clock())
        finish_reason = _text_or_none(choice.get("finish_reason")) or finish_reason
    if not done and finish_reason is None:
        raise AnswerError(
            f"the stream ended early, after {len(texts)} chunks of text: "
            "neither a finish reason nor [DONE] came"
        )
    full = "".join(texts)
    body: dict[str, Any] = {"message": {"role": "assistant", "content": full}}
    choice = {"index": 0, "finish_reason": finish_reason, **(body if chat else {"text": full})}
    raw: dict[str, Any] = {
        key: head[key] for key in ("id", "object", "created", "model") if key in head
    }
    raw.update(choices=[choice], **({"usage": usage} if usage else {}))
    answer = Answer(
        text=full,
        finish_reason=finish_reason,
        model=_text_or_none(head.get("model")),
        prompt_tokens=_usage(raw, "prompt_tokens"),
        completion_tokens=_usage(raw, "completion_tokens"),
        raw=raw,
        text_times=times,
    )
    _require_text(answer, thought=thought)
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


def measure(answer: Answer, started: float, latency_ms: float, *, stream: bool) -> dict[str, Any]:
    """The part of a result that is read off the answer and its times.

    TTFT is the time to the first chunk with text; the inter-token latencies lie between chunks with
    text, so TTFT is not among them; TPOT is from the first text to the last, per token behind the
    first.
    """
    tokens, counted_by = answer.completion_tokens, "usage"
    if tokens is None and stream:
        tokens, counted_by = len(answer.text_times), "chunks"
    elif tokens is None:
        tokens, counted_by = len(answer.text.split()), "words"
    result: dict[str, Any] = {
        "generated_text": answer.text,
        "tokens_generated": tokens,
        "tokens_counted_by": counted_by,
        "tokens_per_second": tokens / latency_ms * 1e3,
        "prompt_tokens": answer.prompt_tokens,
        "finish_reason": answer.finish_reason,
    }
    if stream:
        times = answer.text_times
        result["ttft_ms"] = (times[0] - started) * 1e3
        result["itl_ms"] = [(later - sooner) * 1e3 for sooner, later in pairwise(times)]
        spread_ms = (times[-1] - times[0]) * 1e3
        result["tpot_ms"] = spread_ms / (tokens - 1) if tokens > 1 else None
    return result


def read_json(data: bytes, what: str) -> dict[str, Any]:
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


def error_text(body: bytes) -> str:
    """The message of an error body, in the shapes that servers use; else the body itself."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return shorten(body)
    if isinstance(content, dict):
        for key in ("error", "message", "detail"):
            value = content.get(key)
            if isinstance(value, dict) and isinstance(value.get("message"), str):
                return shorten(value["message"].encode())
            if isinstance(value, str) and value:
                return shorten(value.encode())
    return shorten(body)


def shorten(body: bytes) -> str:
    """The body as one line of text, cut."""
    text = " ".join(body.decode("utf-8", "replace").split())
    return text if len(text) <= _ERROR_CHARS else text[:_ERROR_CHARS] + "..."


def _events(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(event name, data) of each server-sent event."""
    name = b""
    data: list[bytes] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield name, b"\n".join(data)
            name, data = b"", []
            continue
        key, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if key == b"data":
            data.append(value)
        elif key == b"event":
            name = value
    if data:  # the last event of a server that leaves out its closing empty line
        yield name, b"\n".join(data)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines end at LF or CR LF only: JSON may hold a raw U+2028, where str.splitlines would cut."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
    if rest:
        yield rest.removesuffix(b"\r")


def _first_choice(content: dict[str, Any], what: str) -> dict[str, Any] | None:
    choices = content.get("choices")
    if not choices:
        return None
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise AnswerError(
            f"{what} has choices of an unknown shape: {shorten(str(choices).encode())}"
        )
    return choices[0]


def _thought(message: dict[str, Any]) -> bool:
    """Whether a reasoning model's hidden text is in this message or delta."""
    return bool(message.get("reasoning_content") or message.get("reasoning"))


def _require_text(answer: Answer, *, thought: bool) -> None:
    if not answer.text:
        why = "only reasoning came, raise max_tokens; " if thought else ""
        raise AnswerError(f"the answer is empty ({why}finish_reason {answer.finish_reason!r})")


def _usage(content: dict[str, Any], key: str) -> int | None:
    usage = content.get("usage")
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else None


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
