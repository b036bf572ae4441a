"""Answers in OpenAI's forms, whole and as streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import Response

from inferlab.scheduler import Request
from inferlab.server.calls import Call, ClientGone, Receive
from inferlab.server.failures import ApiError
from inferlab.specdec.text import TextStream

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
_REASONS = {"stop_string": "stop"}


def finish_reason(request: Request) -> str | None:
    """OpenAI's word for why a request ended."""
    reason = request.finish_reason
    return None if reason is None else _REASONS.get(reason, reason)


def usage_of(requests: Sequence[Request], choices: int) -> Json:
    """Tokens of all choices; a prompt counts once for the choices that it has."""
    prompt = sum(len(request.prompt) for request in requests[::choices])
    completion = sum(request.num_output for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def failure_of(request: Request) -> ApiError | None:
    """What to say of a request that ended without an answer."""
    if request.finish_reason == "error":
        return ApiError(500, request.error or "the request failed")
    if request.finish_reason == "aborted":
        return ApiError(503, "the server is shutting down", retry_after=1)
    return None


class Form(Protocol):
    """How choices are written down."""

    prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, index: int, text: str, reason: str | None) -> Json:
        """A choice of a whole answer."""

    def piece(self, index: int, text: str, reason: str | None, first: bool) -> Json:
        """A choice of a chunk: new text, or the end.

        Args:
            first: nothing of this choice came before.
        """


class TextForm:
    """``/v1/completions``."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def whole(self, index: int, text: str, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def piece(self, index: int, text: str, reason: str | None, first: bool) -> Json:
        return self.whole(index, text, reason)


class ChatForm:
    """``/v1/chat/completions``."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def whole(self, index: int, text: str, reason: str | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def piece(self, index: int, text: str, reason: str | None, first: bool) -> Json:
        delta = {"role": "assistant"} if first else {}
        if text:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


class Answer:
    """One answer, of one or more choices.

    Args:
        texts: of each choice, its text as it grows.
        before: of each choice, what stands in front of its text (``echo``).
        choices: per prompt.
    """

    def __init__(
        self,
        call: Call,
        form: Form,
        model: str,
        texts: Sequence[TextStream],
        before: Sequence[str],
        choices: int,
        include_usage: bool,
    ) -> None:
        self._call = call
        self._form = form
        self._texts = texts
        self._before = before
        self._choices = choices
        self._include_usage = include_usage
        self._head = {
            "id": form.prefix + uuid.uuid4().hex,
            "object": form.whole_object,
            "created": int(time.time()),
            "model": model,
        }

    def abort(self) -> None:
        """Ends what has not ended."""
        self._call.abort()

    async def whole(self, receive: Receive) -> Json:
        """The answer, once all choices have ended.

        Raises:
            ApiError: one of them failed.
            ClientGone: nobody waits for it any more.
        """
        requests = self._call.requests
        async with aclosing(self._call.emissions(receive)) as emissions:
            async for _ in emissions:
                pass
        for request in requests:
            if failure := failure_of(request):
                raise failure
        made = [
            self._form.whole(i, self._before[i] + (r.text or ""), finish_reason(r))
            for i, r in enumerate(requests)
        ]
        return {**self._head, "choices": made, "usage": usage_of(requests, self._choices)}

    async def events(self, receive: Receive) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, all that there is at a time as one piece of bytes."""
        requests = self._call.requests
        index_of = {request: index for index, request in enumerate(requests)}
        begun: set[int] = set()

        def chunk(index: int, text: str, reason: str | None = None) -> bytes:
            first = index not in begun
            begun.add(index)
            return self._chunk(self._form.piece(index, text, reason, first))

        if any(self._before):
            yield b"".join(chunk(i, before) for i, before in enumerate(self._before))
        async with aclosing(self._call.emissions(receive)) as emissions:
            async for came in emissions:
                out: list[bytes] = []
                for emission in came:
                    request = emission.request
                    index = index_of[request]
                    if failure := failure_of(request):
                        yield b"".join(out) + _event(failure.body())
                        return
                    stream = self._texts[index]
                    if emission.finished:
                        text = stream.end(request.text or "")
                    else:
                        text = stream.add(emission.tokens)
                    if text:
                        out.append(chunk(index, text))
                    if emission.finished:
                        out.append(chunk(index, "", finish_reason(request)))
                if out:
                    yield b"".join(out)
        if self._include_usage:
            used = {"choices": [], "usage": usage_of(requests, self._choices)}
            yield _event(self._chunk_head | used)
        yield DONE

    @property
    def _chunk_head(self) -> Json:
        return self._head | {"object": self._form.chunk_object}

    def _chunk(self, choice: Json) -> bytes:
        chunk = self._chunk_head | {"choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return _event(chunk)


class EventStream(Response):
    """An ASGI response of server-sent events.

    A reader that is slow holds up its own answer alone: the engine goes on, and what it has made by
    the time the reader takes more is sent together.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        headers = self.raw_headers
        start = {"type": "http.response.start", "status": self.status_code, "headers": headers}
        try:
            await send(start)
            async with aclosing(self._answer.events(receive)) as events:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            pass
        finally:
            self._answer.abort()


def _event(content: Json) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text}\n\n".encode()
