"""An answer as it comes off the socket: its events, the time of each, and what they carry."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import orjson

from inferlab.client.answers import (
    FAILED,
    KEEP_ALIVE,
    AnswerError,
    error_text,
    first_choice,
    join_texts,
    piece_of,
    shorten,
    text_or_none,
    usage_count,
)
from inferlab.client.sse import Event, EventParser
from inferlab.load.failures import RequestFailure


class Reading:
    """Takes the bytes of one streamed answer, each with the time of the socket read it came with.

    A server that answers with one JSON body has answered, too: its text came as a whole, with the
    last byte.

    Attributes:
        text_ns: when each event with content or reasoning came.
        first_content_ns: when the first with content came.
        last_ns: when the last byte came.
        failure: why it is no answer. Nothing is read behind it.
        done: ``[DONE]`` came. Nothing is read behind it.
        events: the last two, in which servers tell figures of the whole request.
    """

    def __init__(self) -> None:
        self.text_ns: list[int] = []
        self.first_content_ns: int | None = None
        self.last_ns: int | None = None
        self.failure: RequestFailure | None = None
        self.done = False
        self.finish_reason: str | None = None
        self.model: str | None = None
        self.usage: dict[str, Any] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=2)
        self.warnings: list[str] = []
        self._parser = EventParser(errors="strict")
        self._texts: list[str] = []
        self._body: list[bytes] | None = None
        self._started = False
        self._chunk_tokens: list[int] | None = []
        self._pending_tokens = 0
        self._used = 0

    @property
    def text(self) -> str:
        return join_texts(self._texts)

    @property
    def chunk_tokens(self) -> list[int] | None:
        """New tokens in each event of ``text_ns``: None where one does not tell.

        An event tells by a ``usage`` that grows from event to event (``continuous_usage_stats``),
        by ``token_ids``, or by the entries of ``logprobs``. Tokens of an event without text (half
        of a character) count in the next one with text.
        """
        return self._chunk_tokens if self.text_ns else None

    @property
    def completion_tokens(self) -> int | None:
        """New tokens by ``usage``; None: it does not tell, or counts none where text came."""
        counted = usage_count({"usage": self.usage}, "completion_tokens")
        return None if counted == 0 and self.text_ns else counted

    @property
    def _told(self) -> int:
        """New tokens by the chunks."""
        return sum(self._chunk_tokens or ()) + self._pending_tokens

    def feed(self, chunk: bytes, stamp_ns: int) -> None:
        """Reads some more bytes, cut anywhere. What is wrong becomes ``failure``."""
        self.last_ns = stamp_ns
        if self.failure is not None or self.done:
            return
        if not self._started and (start := chunk.lstrip(b"\xef\xbb\xbf \r\n\t")):
            self._started = True
            self._body = [] if start.startswith(b"{") else None
        if self._body is not None:
            self._body.append(chunk)
            return
        try:
            for event in self._parser.feed(chunk):
                self._take(event, stamp_ns)
                if self.done:
                    return
        except UnicodeDecodeError as error:
            self.failure = RequestFailure("bad_utf8", f"the stream is not UTF-8: {error}")
        except RequestFailure as failure:
            self.failure = failure

    def finish(self) -> None:
        """The end of the body. A body cut short, and one that is no answer, become ``failure``."""
        if self.failure is not None:
            return
        try:
            if self._body is not None:
                self._take_whole(b"".join(self._body))
            elif not self.done and (last := self._parser.finish()) is not None:
                self._take_last(last)
            self._require_end()
        except UnicodeDecodeError as error:
            self.failure = RequestFailure("bad_utf8", f"the answer is not UTF-8: {error}")
        except RequestFailure as failure:
            self.failure = failure

    def _take(self, event: Event, stamp_ns: int) -> None:
        data, kind = event
        if data.startswith("[DONE]") and data.strip() == "[DONE]":
            self.done = True
            return
        if kind in KEEP_ALIVE or not data.strip():
            return
        if kind == "error":
            raise RequestFailure("error_event", "the server reports: " + error_text(data))
        content = self._object(data)
        choice = self._heads(content)
        if choice is None:
            return
        piece = piece_of(choice)
        if self._chunk_tokens is not None:
            self._count(content, choice, bool(piece.text or piece.thought))
        if piece.text or piece.thought:
            self.text_ns.append(stamp_ns)
        if piece.text:
            self._texts.append(piece.text)
            if self.first_content_ns is None:
                self.first_content_ns = stamp_ns
        if choice.get("finish_reason"):
            self.finish_reason = text_or_none(choice["finish_reason"])

    def _take_last(self, event: Event) -> None:
        """One that no blank line ends: it may be whole all the same."""
        try:
            self._take(event, self.last_ns or 0)
        except RequestFailure as failure:
            if failure.kind != "malformed_json":
                raise
            raise RequestFailure(
                "truncated", f"the stream ended within an event: {shorten(event[0])}"
            ) from None

    def _take_whole(self, body: bytes) -> None:
        self.warnings.append("not_streamed")
        content = self._object(body.decode("utf-8-sig"))
        choice = self._heads(content)
        if choice is None:
            raise RequestFailure("malformed_json", "the answer has no choices: " + shorten(body))
        piece = piece_of(choice)
        self._texts.append(piece.text)
        self.finish_reason = text_or_none(choice.get("finish_reason"))
        self._chunk_tokens = None
        if piece.text or piece.thought:
            self.text_ns.append(self.last_ns or 0)
        if piece.text:
            self.first_content_ns = self.last_ns

    @staticmethod
    def _object(data: str) -> dict[str, Any]:
        try:
            content = _parse(data)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise RequestFailure("malformed_json", "no JSON object: " + shorten(data))
        if content.get("error") or content.get("object") == "error":
            raise RequestFailure("error_event", "the server reports: " + error_text(data))
        return content

    def _heads(self, content: dict[str, Any]) -> dict[str, Any] | None:
        """Takes what stands beside the choices, and returns the first of them."""
        model = text_or_none(content.get("model"))
        if self.model is None:
            self.model = model
        elif model is not None and model != self.model:
            raise RequestFailure(
                "wrong_model", f"{self.model!r} began to answer, {model!r} went on"
            )
        if isinstance(content.get("usage"), dict):
            self.usage = content["usage"]
        self.events.append(content)
        try:
            return first_choice(content, "a chunk")
        except AnswerError as error:
            raise RequestFailure("malformed_json", str(error)) from None

    def _count(self, content: dict[str, Any], choice: dict[str, Any], has_text: bool) -> None:
        total = usage_count(content, "completion_tokens")
        if total is not None:
            tokens = total - self._used
            self._used = total
        elif isinstance(choice.get("token_ids"), list):
            tokens = len(choice["token_ids"])
        elif isinstance(entries := _logprobs(choice), list):
            tokens = len(entries)
        elif has_text:
            self._chunk_tokens = None
            return
        else:
            return
        self._pending_tokens += tokens
        if has_text and self._chunk_tokens is not None:
            self._chunk_tokens.append(self._pending_tokens)
            self._pending_tokens = 0

    def _require_end(self) -> None:
        if self._body is None and not self.done:
            if self.finish_reason is None:
                raise RequestFailure(
                    "truncated",
                    f"the stream ended early, after {len(self.text_ns)} chunks of text: neither a "
                    "finish reason nor [DONE] came",
                )
            self.warnings.append("no_done")
        elif self.text_ns and self.finish_reason is None:
            self.warnings.append("no_finish_reason")
        if self.finish_reason in FAILED:
            raise RequestFailure(
                "error_event", f"the server gave up (finish_reason {self.finish_reason!r})"
            )
        if not self.text_ns and self.finish_reason is None:
            raise RequestFailure(
                "empty", f"the answer is empty (finish_reason {self.finish_reason!r})"
            )
        if self.completion_tokens is None:
            self.warnings.append("missing_usage")
        elif self._chunk_tokens and abs(self._told - self.completion_tokens) > 1:
            self.warnings.append("usage_differs")  # by one: the end of the text


def _parse(data: str) -> object:
    """What the JSON says. The fast reader refuses some that Python's takes: half of a surrogate
    pair, NaN, deep nesting.

    Raises:
        ValueError, RecursionError: it is no JSON.
    """
    try:
        return orjson.loads(data)
    except ValueError:
        return json.loads(data)


def _logprobs(choice: dict[str, Any]) -> object:
    """The entries of ``logprobs``, one for each token: chat has ``content``, text ``tokens``."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        return None
    return logprobs.get("content", logprobs.get("tokens"))


def names_model(answered: str | None, asked: str | None) -> bool:
    """Whether the model that answered is the one that was asked.

    A server that does not tell is believed, and one may add a version: ``gpt-x-2026-01-01``,
    ``gpt-x:2`` and ``gpt-x@main`` are a ``gpt-x``.
    """
    if not answered or not asked:
        return True
    return answered == asked or answered.startswith(tuple(asked + sign for sign in "-:@"))
