"""Answers in OpenAI's forms, whole and as streams."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import Response

from inferlab.scheduler import Request
from inferlab.server.calls import Call, ClientGone, Receive
from inferlab.server.failures import ApiError
from inferlab.server.tokens import TokenNames
from inferlab.specdec.emission import Emission
from inferlab.specdec.text import TextStream
from inferlab.types import SpeculationStats, TokenLogprobs

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_REASONS = {"stop_string": "stop"}


def finish_reason(request: Request) -> str | None:
    """OpenAI's word for why a request ended."""
    reason = request.finish_reason
    return None if reason is None else _REASONS.get(reason, reason)


def usage_of(requests: Sequence[Request], choices: int) -> Json:
    """Tokens of all choices; a prompt counts once for the choices that it has. Of requests with a
    prediction, the drafts that were accepted, or not, are its tokens."""
    prompt = sum(len(request.prompt) for request in requests[::choices])
    completion = sum(request.num_output for request in requests)
    predicted = [request.stats for request in requests if request.predicted]
    accepted = sum(stats.accepted for stats in predicted)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(s.proposed for s in predicted) - accepted,
        },
        "prompt_tokens_details": {"cached_tokens": sum(r.num_shared for r in requests[::choices])},
    }


def speculation_of(requests: Sequence[Request]) -> Json:
    """What drafting came to, under vLLM's names and with their meaning: of the steps with drafts
    alone, and entry j of the histogram counts those of which j were accepted."""
    stats = SpeculationStats()
    for request in requests:
        stats.add(request.stats)
    drafts = stats.offered_at[0] if stats.offered_at else 0
    at_least = [drafts, *stats.accepted_at, 0]
    return {
        "mean_acceptance_length": 1 + stats.accepted / drafts if drafts else 1.0,
        "draft_acceptance_rate": stats.acceptance_rate,
        "acceptance_histogram": [a - b for a, b in itertools.pairwise(at_least)],
        "num_spec_steps": drafts,
        "num_steps": stats.steps,
        "tokens_per_step": stats.mean_accepted_length,
        "num_accepted_draft_tokens": stats.accepted,
        "num_draft_tokens": stats.proposed,
        "num_draft_nodes": stats.draft_nodes,
        "num_spec_tokens": len(stats.offered_at),
    }


def failure_of(request: Request) -> ApiError | None:
    """What to say of a request that ended without an answer."""
    if request.finish_reason == "error":
        return ApiError(500, request.error or "the request failed")
    if request.finish_reason == "deadline":
        return ApiError(504, "the request took longer than it may", code="timeout")
    if request.finish_reason == "aborted":
        return ApiError(503, "the server is shutting down", retry_after=1)
    return None


class Form(Protocol):
    """How choices are written down.

    ``logprobs`` of its methods are those of the text's tokens, or None where nobody asked.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def logprobs(
        self, names: TokenNames, tokens: Sequence[int], of: Sequence[TokenLogprobs], offset: int
    ) -> Json:
        """Log-probabilities of tokens, before which so many characters were."""

    def whole(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        """A choice of a whole answer."""

    def piece(
        self, index: int, text: str, logprobs: Json | None, reason: str | None, first: bool
    ) -> Json:
        """A choice of a chunk: new text, or the end.

        Args:
            first: nothing of this choice came before.
        """


class TextForm:
    """``/v1/completions``."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def logprobs(
        self, names: TokenNames, tokens: Sequence[int], of: Sequence[TokenLogprobs], offset: int
    ) -> Json:
        return names.of_text(tokens, of, offset)

    def whole(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def piece(
        self, index: int, text: str, logprobs: Json | None, reason: str | None, first: bool
    ) -> Json:
        return self.whole(index, text, logprobs, reason)


class ChatForm:
    """``/v1/chat/completions``."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def logprobs(
        self, names: TokenNames, tokens: Sequence[int], of: Sequence[TokenLogprobs], offset: int
    ) -> Json:
        return names.of_chat(tokens, of)

    def whole(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def piece(
        self, index: int, text: str, logprobs: Json | None, reason: str | None, first: bool
    ) -> Json:
        delta = {"role": "assistant"} if first else {}
        if text:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


@dataclass
class Extras:
    """What an answer holds beside its texts.

    Attributes:
        usage: whether a stream ends with it; whole answers always have it.
        usage_so_far: whether its chunks have that of their choice.
        names: of tokens, where something is told of each.
        logprobs: whether their log-probabilities are.
        tokens: whether how they came is, in a stream.
        speculation: whether what came of drafting is told.
    """

    usage: bool = False
    usage_so_far: bool = False
    names: TokenNames | None = None
    logprobs: bool = False
    tokens: bool = False
    speculation: bool = False


class Growing:
    """A choice of a stream: its text, and the log-probabilities of what has not been sent."""

    def __init__(self, text: TextStream, before: str) -> None:
        self.text = text
        self.before = before
        self.begun = False
        self.came = 0
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.offset = len(before)

    def take(self, names: TokenNames, form: Form) -> Json | None:
        """The log-probabilities that are due; None: there are none."""
        if not self.logprobs:
            return None
        made = form.logprobs(names, self.tokens, self.logprobs, self.offset)
        self.offset += sum(len(names.name(token)) for token in self.tokens)
        self.tokens, self.logprobs = [], []
        return made


class Answer:
    """One answer, of one or more choices.

    Args:
        texts: of each choice, its text as it grows; streams only.
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
        extras: Extras,
    ) -> None:
        self._call = call
        self._form = form
        self._before = before
        self._growing = list(map(Growing, texts, before))
        self._choices = choices
        self._extras = extras
        self._head = {
            "id": form.prefix + uuid.uuid4().hex,
            "object": form.whole_object,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_head = self._head | {"object": form.chunk_object}

    def abort(self) -> None:
        """Ends what has not ended."""
        self._call.abort()

    async def whole(self, receive: Receive) -> Json:
        """The answer, once all choices have ended.

        Raises:
            ApiError: one of them failed.
            ClientGone: nobody waits for it any more.
        """
        async with aclosing(self._call.emissions(receive)) as emissions:
            async for _ in emissions:
                pass
        made = []
        names = self._extras.names if self._extras.logprobs else None
        for index, request in enumerate(self._call.requests):
            if failure := failure_of(request):
                raise failure
            before = self._before[index]
            logprobs = None
            if names is not None:
                logprobs = self._form.logprobs(names, request.output, request.logprobs, len(before))
            text = before + (request.text or "")
            made.append(self._form.whole(index, text, logprobs, finish_reason(request)))
        return {**self._head, "choices": made, **self._figures()}

    async def events(self, receive: Receive) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, all that there is at a time as one piece of bytes."""
        index_of = {request: index for index, request in enumerate(self._call.requests)}
        if any(self._before):
            yield b"".join(self._chunk(i, before) for i, before in enumerate(self._before))
        async with aclosing(self._call.emissions(receive)) as emissions:
            async for came in emissions:
                out: list[bytes] = []
                for emission in came:
                    index = index_of[emission.request]
                    if failure := failure_of(emission.request):
                        yield b"".join(out) + write_event(failure.body())
                        return
                    out += self._chunks(index, emission)
                if out:
                    yield b"".join(out)
        if self._extras.usage or self._extras.speculation:
            yield write_event(self._chunk_head | {"choices": [], **self._figures()})
        yield DONE

    def _chunks(self, index: int, emission: Emission) -> list[bytes]:
        """What a choice has got, as events."""
        growing = self._growing[index]
        request = emission.request
        logprobs = None
        names = self._extras.names
        growing.came += len(emission.tokens)
        if self._extras.logprobs:
            growing.tokens += emission.tokens
            growing.logprobs += emission.logprobs
        if emission.finished:
            text = growing.text.end(request.text or "")
        else:
            text = growing.text.add(emission.tokens)
        if names is not None and (text or emission.finished):
            logprobs = growing.take(names, self._form)
        came = []
        if names is not None and self._extras.tokens:
            came = [
                {"text": names.name(token), "drafted": place < emission.drafted}
                for place, token in enumerate(emission.tokens)
            ]
        out = []
        if text or logprobs or came:
            out.append(self._chunk(index, text, logprobs, came=came))
        if emission.finished:
            out.append(self._chunk(index, "", None, finish_reason(request)))
        return out

    def _figures(self) -> Json:
        """What is told at the end."""
        requests = self._call.requests
        figures: Json = {"usage": usage_of(requests, self._choices)}
        if self._extras.speculation:
            figures["metrics"] = {"speculative_decoding": speculation_of(requests)}
        return figures

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: Json | None = None,
        reason: str | None = None,
        came: Sequence[Json] = (),
    ) -> bytes:
        growing = self._growing[index]
        first, growing.begun = not growing.begun, True
        choice = self._form.piece(index, text, logprobs, reason, first)
        if came:
            choice["tokens"] = came
        chunk = self._chunk_head | {"choices": [choice]}
        if self._extras.usage:
            chunk["usage"] = self._usage_so_far(index) if self._extras.usage_so_far else None
        return write_event(chunk)

    def _usage_so_far(self, index: int) -> Json:
        prompt, came = len(self._call.requests[index].prompt), self._growing[index].came
        return {
            "prompt_tokens": prompt,
            "completion_tokens": came,
            "total_tokens": prompt + came,
        }


class Streamed(Protocol):
    """What can be sent as a stream."""

    def events(self, receive: Receive) -> AsyncGenerator[bytes]:
        """Its events, all that there is at a time as one piece of bytes."""

    def abort(self) -> None:
        """Ends what has not ended."""


class EventStream(Response):
    """An ASGI response of server-sent events.

    A reader that is slow holds up its own answer alone: the engine goes on, and what it has made by
    the time the reader takes more is sent together.
    """

    def __init__(self, answer: Streamed) -> None:
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


def write_event(content: Json, kind: str | None = None) -> bytes:
    """A server-sent event."""
    text = _encode(content)
    return (f"event: {kind}\ndata: {text}\n\n" if kind else f"data: {text}\n\n").encode()
