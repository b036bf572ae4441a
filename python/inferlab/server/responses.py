"""``/v1/responses``: OpenAI's newer form of a chat, as far as texts go; nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field

from inferlab.server.answers import Json, failure_of, speculation_of, usage_of, write_event
from inferlab.server.calls import Call, Receive
from inferlab.server.failures import ApiError
from inferlab.server.protocol import (
    MAX_TOKENS,
    ApiModel,
    ChatMessage,
    JsonSchemaFormat,
    RequestFields,
    Unused,
)
from inferlab.specdec.grammar import Grammar
from inferlab.specdec.text import TextStream


class InputMessage(ChatMessage):
    """A message of ``input``."""

    type: Literal["message"] = "message"
    id: Unused = None
    status: Unused = None


class AnyText(ApiModel):
    """A format: texts of any kind, or any JSON object."""

    type: Literal["text", "json_object"]

    def grammar(self) -> Grammar | None:
        return Grammar.json_object() if self.type == "json_object" else None


class JsonText(JsonSchemaFormat):
    """A format: JSON of a schema, which is written beside its type here."""

    type: Literal["json_schema"]

    def grammar(self) -> Grammar:
        return Grammar.json_schema(self.schema_)


class TextFields(ApiModel):
    """``text`` of a request: how its answer is written."""

    format: Annotated[AnyText | JsonText, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None

    def grammar(self) -> Grammar | None:
        return None if self.format is None else self.format.grammar()


class ResponsesRequest(RequestFields):
    """The body of ``/v1/responses``."""

    input: str | Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    text: TextFields | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Unused = None
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None

    def num_logprobs(self) -> int | None:
        return None

    def _grammar_fields(self) -> dict[str, Callable[[Any], Grammar | None]]:
        return {**super()._grammar_fields(), "text": TextFields.grammar}

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        if self.max_output_tokens is not None:
            given["max_tokens"] = self.max_output_tokens
        return given

    def messages(self) -> list[dict[str, str]]:
        """The conversation for a chat template."""
        said = [] if self.instructions is None else [("system", self.instructions)]
        if isinstance(self.input, str):
            said.append(("user", self.input))
        else:
            said += [(message.role, message.text()) for message in self.input]
        return [{"role": role, "content": content} for role, content in said]


class ResponseAnswer:
    """One answer.

    Args:
        text: as it grows; streams only.
        body: what was asked.
    """

    def __init__(
        self, call: Call, model: str, text: TextStream | None, body: ResponsesRequest
    ) -> None:
        self._call = call
        (self._request,) = call.requests
        self._text = text
        self._number = 0
        self._tells_speculation = body.speculation is not None and body.speculation.stats
        self._item = "msg_" + uuid.uuid4().hex
        params = self._request.params
        written = (body.text and body.text.format) or AnyText(type="text")
        self._head: Json = {
            "id": "resp_" + uuid.uuid4().hex,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": written.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def abort(self) -> None:
        """Ends it, if it has not ended."""
        self._call.abort()

    async def whole(self, receive: Receive) -> Json:
        """The answer, once it has ended.

        Raises:
            ApiError: it failed.
            ClientGone: nobody waits for it any more.
        """
        async with aclosing(self._call.emissions(receive)) as emissions:
            async for _ in emissions:
                pass
        if failure := failure_of(self._request):
            raise failure
        return self._finished()

    async def events(self, receive: Receive) -> AsyncGenerator[bytes]:
        """The answer as the events of a stream."""
        assert self._text is not None
        begun = {**self._head, "status": "in_progress", "output": []}
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield (
            self._event("response.created", response=begun)
            + self._event("response.in_progress", response=begun)
            + self._event(
                "response.output_item.added", output_index=0, item=self._message("in_progress")
            )
            + self._event("response.content_part.added", **place, part=_part(""))
        )
        async with aclosing(self._call.emissions(receive)) as emissions:
            async for came in emissions:
                text = ""
                for emission in came:
                    if failure := failure_of(self._request):
                        yield self._failed(failure)
                        return
                    if emission.finished:
                        text += self._text.end(self._request.text or "")
                    else:
                        text += self._text.add(emission.tokens)
                if text:
                    yield self._event(
                        "response.output_text.delta", **place, delta=text, logprobs=[]
                    )
        done = self._finished()
        text = self._request.text or ""
        yield (
            self._event("response.output_text.done", **place, text=text, logprobs=[])
            + self._event("response.content_part.done", **place, part=_part(text))
            + self._event("response.output_item.done", output_index=0, item=done["output"][0])
            + self._event(f"response.{done['status']}", response=done)
        )

    def _finished(self) -> Json:
        cut = self._request.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        usage = usage_of([self._request], 1)
        figures = {}
        if self._tells_speculation:
            figures["metrics"] = {"speculative_decoding": speculation_of([self._request])}
        return {
            **self._head,
            **figures,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._message(status, self._request.text)],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    def _failed(self, failure: ApiError) -> bytes:
        error = {"code": failure.code or "server_error", "message": str(failure)}
        failed = {**self._head, "status": "failed", "error": error, "output": []}
        return self._event("response.failed", response=failed)

    def _message(self, status: str, text: str | None = None) -> Json:
        return {
            "id": self._item,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [] if text is None else [_part(text)],
        }

    def _event(self, kind: str, **content: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return write_event({"type": kind, "sequence_number": number, **content}, kind)


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
