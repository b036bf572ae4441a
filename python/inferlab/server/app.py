"""The OpenAI-compatible application: which paths there are, and what each does."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from inferlab import __version__
from inferlab.scheduler import Request
from inferlab.server.answers import Answer, ChatForm, EventStream, Form, TextForm
from inferlab.server.calls import Call, ClientGone, Waker
from inferlab.server.engine_thread import EngineThread, QueueFull, Unavailable
from inferlab.server.failures import ApiError, of_validation
from inferlab.server.gate import Gate
from inferlab.server.metrics import Metrics
from inferlab.server.protocol import ChatRequest, CompletionRequest, SamplingFields
from inferlab.server.settings import ServerSettings
from inferlab.specdec.grammar import GrammarError
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.text import NewText, TextStream, text_decoder, unsettled_tokens

LONG_TEXT = 4096
"""Texts of more characters are tokenized in a thread, so that the loop goes on meanwhile."""
DEFAULT_MAX_TOKENS = 16
"""New tokens of a text completion that says nothing of them, as in OpenAI's API."""

Body = TypeVar("Body", bound=SamplingFields)


class Service:
    """A pipeline that is served.

    Args:
        pipeline: its engine belongs to the service from `start` on.
    """

    def __init__(self, pipeline: SpeculativePipeline, settings: ServerSettings) -> None:
        self.pipeline = pipeline
        self.settings = settings
        self.model = settings.model_name or pipeline.target.name
        self.created = int(time.time())
        self.metrics = Metrics(self.model)
        self.engine = EngineThread(
            pipeline.engine, settings.max_waiting, on_finish=self.metrics.finished
        )
        self.metrics.watch(self.engine)
        tokenizer = pipeline.target.tokenizer
        self._decode = text_decoder(tokenizer)
        self._unsettled = unsettled_tokens(tokenizer)
        self._tokenizing = asyncio.Lock()
        own = {"temperature", "do_sample"} & pipeline.config.model_fields_set
        self._defaults = {} if own else {"temperature": 1.0}  # OpenAI's

    def start(self) -> None:
        """Begins to serve; in the running loop."""
        self._waker = Waker(asyncio.get_running_loop())
        self.engine.start()

    async def complete(self, body: CompletionRequest, http: HttpRequest) -> Any:
        """Answers ``/v1/completions``."""
        self._check_model(body.model)
        given = {"max_tokens": DEFAULT_MAX_TOKENS, **body.sampling()}
        texts = body.prompts()
        if not texts:
            raise ApiError(400, "prompt: must not be empty", param="prompt")
        self._check_choices(len(texts) * (body.n or 1))
        prompts = [await self._tokens(text) for text in texts]
        before = [self._echo(text) if body.echo else "" for text in texts]
        return await self._answer(prompts, given, before, TextForm(), body, http)

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Any:
        """Answers ``/v1/chat/completions``."""
        self._check_model(body.model)
        self._check_choices(body.n or 1)
        messages = body.conversation()
        size = sum(len(message["content"]) for message in messages)
        try:
            prompt = await self._off_loop(size, self.pipeline.chat_prompt, messages)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        given = body.sampling()
        if "max_tokens" not in given:
            given["max_tokens"] = max(self._room(prompt), 1)
        return await self._answer([prompt], given, [""], ChatForm(), body, http)

    def models(self) -> list[dict[str, Any]]:
        """What is served."""
        return [
            {
                "id": self.model,
                "object": "model",
                "created": self.created,
                "owned_by": "inferlab",
                "max_model_len": self._limit,
            }
        ]

    @property
    def _limit(self) -> int:
        """Tokens of the longest text: of the target's context and of the K/V cache."""
        scheduler = self.pipeline.engine.scheduler
        pages = scheduler.allocator
        room = pages.num_pages * pages.page_size - scheduler.tree_slots
        context = self.pipeline.target.context_length
        return room if context is None else min(room, context)

    def _room(self, prompt: Sequence[int]) -> int:
        return self._limit - len(prompt)

    def _check_model(self, model: str | None) -> None:
        if model not in (None, self.model):
            raise ApiError(
                404,
                f"the model {model!r} is not served here; {self.model!r} is",
                param="model",
                code="model_not_found",
            )

    def _check_choices(self, count: int) -> None:
        if count > self.settings.max_choices:
            raise ApiError(
                400,
                f"{count} choices are asked for (prompts x n); at most "
                f"{self.settings.max_choices} are made",
                param="n",
            )

    async def _off_loop(self, size: int, function: Any, *args: Any) -> Any:
        """Calls a function of a text, in a thread if that is long; one of those at a time."""
        if size <= LONG_TEXT:
            return function(*args)
        async with self._tokenizing:
            return await asyncio.to_thread(function, *args)

    async def _tokens(self, prompt: str | list[int]) -> list[int]:
        size = len(prompt) if isinstance(prompt, str) else 0
        try:
            ids: list[int] = await self._off_loop(size, self.pipeline.encode, prompt)
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from error
        return ids

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._decode(prompt)

    async def _answer(
        self,
        prompts: Sequence[list[int]],
        given: dict[str, Any],
        before: Sequence[str],
        form: Form,
        body: SamplingFields,
        http: HttpRequest,
    ) -> Any:
        count = body.n or 1
        for prompt in prompts:
            self._check_room(prompt, given["max_tokens"])
        requests = await self._requests(prompts, given, body)
        stream = bool(body.stream)
        call = Call(self.engine, self._waker, requests, stream)
        try:
            call.submit()
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=1) from error
        except Unavailable as error:
            raise ApiError(503, str(error), retry_after=1) from error
        texts = [
            TextStream(NewText(self._decode, r.prompt), r.params.stop, self._unsettled)
            for r in (requests if stream else ())
        ]
        options = body.stream_options
        answer = Answer(
            call,
            form,
            self.model,
            texts,
            [text for text in before for _ in range(count)],
            count,
            options is not None and options.include_usage,
        )
        if stream:
            return EventStream(answer)
        try:
            return JSONResponse(await answer.whole(http.receive))
        except ClientGone:
            return Response(status_code=499)  # nobody reads it

    async def _requests(
        self, prompts: Sequence[list[int]], given: dict[str, Any], body: SamplingFields
    ) -> list[Request]:
        """The requests of all choices. Grammars are compiled in a thread."""

        def make(given: dict[str, Any]) -> list[Request]:
            return [
                self._request(prompt, given, body.seed, choice)
                for prompt in prompts
                for choice in range(body.n or 1)
            ]

        try:
            held_to = body.grammar()
        except GrammarError as error:
            raise ApiError(400, str(error), param=str(error).split(":", 1)[0]) from error
        if held_to is None:
            return make(given)
        field, grammar = held_to
        try:
            made: list[Request] = await self._off_loop(
                LONG_TEXT + 1, make, given | {"grammar": grammar}
            )
        except GrammarError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from error
        return made

    def _request(
        self, prompt: list[int], given: dict[str, Any], seed: int | None, choice: int
    ) -> Request:
        """The choices of a seed are those of the seeds that follow it."""
        given = self._defaults | given
        first = secrets.randbits(64) if seed is None else seed
        try:
            return self.pipeline.request(prompt, seed=(first + choice) % 2**64, **given)
        except GrammarError:
            raise
        except ValueError as error:
            param = str(error).split(" ", 1)[0]
            raise ApiError(400, str(error), param=param if param in given else None) from error

    def _check_room(self, prompt: Sequence[int], max_tokens: int) -> None:
        if len(prompt) + max_tokens <= self._limit:
            return
        raise ApiError(
            400,
            f"This model's maximum context length is {self._limit} tokens, but "
            f"{len(prompt) + max_tokens} are asked for: {len(prompt)} of the prompt and "
            f"{max_tokens} new ones. Shorten the prompt or ask for fewer.",
            param="max_tokens" if len(prompt) < self._limit else "prompt",
            code="context_length_exceeded",
        )


def create_app(pipeline: SpeculativePipeline, settings: ServerSettings | None = None) -> FastAPI:
    """The application that serves a pipeline; ``app.state.service`` is what stands behind it."""
    settings = settings or ServerSettings()
    service = Service(pipeline, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)

    app = FastAPI(title="LLM Inference Lab", version=__version__, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Gate, keys=settings.api_keys, max_body_bytes=settings.max_body_bytes)

    @app.exception_handler(ApiError)
    async def _api_error(_: HttpRequest, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def _http_error(_: HttpRequest, error: HTTPException) -> JSONResponse:
        made = ApiError(error.status_code, str(error.detail))
        return JSONResponse(made.body(), error.status_code, headers=error.headers)

    @app.post("/v1/completions", **_described(CompletionRequest))
    async def completions(http: HttpRequest) -> Response:
        return await service.complete(await _read(http, CompletionRequest), http)

    @app.post("/v1/chat/completions", **_described(ChatRequest))
    async def chat_completions(http: HttpRequest) -> Response:
        return await service.chat(await _read(http, ChatRequest), http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{model:path}", responses={404: _ERROR})
    async def model(model: str) -> dict[str, Any]:
        for known in service.models():
            if known["id"] == model:
                return known
        raise ApiError(404, f"the model {model!r} is not served here", code="model_not_found")

    @app.get("/health", responses={503: _ERROR})
    async def health() -> Response:
        if service.engine.failure is not None:
            raise ApiError(503, service.engine.failure)
        return Response()

    @app.get("/ready", responses={503: _ERROR})
    async def ready() -> Response:
        try:
            service.engine.check_taking()
        except Unavailable as error:
            raise ApiError(503, str(error)) from error
        return Response()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(
            service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    app.openapi = functools.cache(functools.partial(_document, app))  # type: ignore[method-assign]
    return app


async def _read(http: HttpRequest, kind: type[Body]) -> Body:
    """The body of a request. Raises ApiError where it is not one."""
    body = await http.body()
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise of_validation(error) from error


_ERROR = {
    "description": "an error",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}


def _described(kind: type[SamplingFields]) -> dict[str, Any]:
    """What the OpenAPI document says of a path that reads its body itself."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
        "responses": {status: _ERROR for status in (400, 401, 404, 413, 429, 500, 503)},
    }


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, bodies included."""
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = models_json_schema(
        [(CompletionRequest, "validation"), (ChatRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    made.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    return made
