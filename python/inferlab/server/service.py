"""What stands behind the paths: bodies become requests of the engine, and those answers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from inferlab.scheduler import READ_BESIDE, Request
from inferlab.server.answers import Answer, ChatForm, EventStream, Extras, Form, TextForm
from inferlab.server.calls import Call, ClientGone, Waker
from inferlab.server.engine_thread import EngineThread, QueueFull, Unavailable
from inferlab.server.failures import ApiError
from inferlab.server.metrics import Metrics
from inferlab.server.protocol import (
    ChatRequest,
    CompletionRequest,
    RequestFields,
    SamplingFields,
    SpeculationFields,
    joined,
)
from inferlab.server.responses import ResponseAnswer, ResponsesRequest
from inferlab.server.settings import ServerSettings
from inferlab.server.tokens import TokenNames
from inferlab.specdec.grammar import GrammarError
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.text import NewText, TextStream, text_decoder, unsettled_tokens
from inferlab.specdec.tree import are_chains

LONG_TEXT = 4096
"""Texts of more characters are tokenized in a thread, so that the loop goes on meanwhile."""
DEFAULT_MAX_TOKENS = 16
"""New tokens of a text completion that says nothing of them, as in OpenAI's API."""


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
        costs = pipeline.known_costs
        self.engine = EngineThread(
            pipeline.engine,
            settings.max_waiting,
            on_finish=self.metrics.finished,
            read_beside=READ_BESIDE if costs is None else costs.read_at_once(),
        )
        self.metrics.watch(self.engine)
        tokenizer = pipeline.target.tokenizer
        self._decode = text_decoder(tokenizer)
        self._unsettled = unsettled_tokens(tokenizer)
        self._tokenizing = asyncio.Lock()
        self._names: TokenNames | None = None  # made when somebody asks
        own = {"temperature", "do_sample"} & pipeline.config.model_fields_set
        self._defaults = {} if own else {"temperature": 1.0}  # OpenAI's

    def start(self) -> None:
        """Begins to serve; in the running loop."""
        self._waker = Waker(asyncio.get_running_loop())
        self.engine.start()

    async def complete(self, body: CompletionRequest, http: HttpRequest) -> Response:
        """Answers ``/v1/completions``."""
        self._check_model(body.model)
        given = {"max_tokens": DEFAULT_MAX_TOKENS, **body.sampling()}
        texts = body.prompts()
        if not texts:
            raise ApiError(400, "prompt: must not be empty", param="prompt")
        self._check_choices(len(texts) * (body.n or 1))
        size = sum(len(text) for text in texts)
        prompts = await self._tokens(
            "prompt", size, lambda: list(map(self.pipeline.encode, texts)), http
        )
        echo = texts if body.echo else None
        return await self._answer(prompts, given, TextForm(), body, http, echo)

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        """Answers ``/v1/chat/completions``."""
        self._check_model(body.model)
        self._check_choices(body.n or 1)
        prompt, given = await self._chat_prompt(body.conversation(), body, http)
        return await self._answer([prompt], given, ChatForm(), body, http)

    async def respond(self, body: ResponsesRequest, http: HttpRequest) -> Response:
        """Answers ``/v1/responses``."""
        self._check_model(body.model)
        prompt, given = await self._chat_prompt(body.messages(), body, http)
        call = await self._call([prompt], given, body, http)
        text = self._text(call.requests[0]) if body.stream else None
        answer = ResponseAnswer(call, self.model, text, body)
        self._submit(call, given)
        return await _send(answer, bool(body.stream), http)

    async def _chat_prompt(
        self, messages: list[dict[str, str]], body: RequestFields, http: HttpRequest
    ) -> tuple[list[int], dict[str, Any]]:
        """A conversation as a prompt, and how to go on: to the end of the context, if the body says
        nothing else."""
        size = sum(len(message["content"]) for message in messages)
        prompts = await self._tokens(
            "messages", size, lambda: [self.pipeline.chat_prompt(messages)], http
        )
        given = body.sampling()
        given.setdefault("max_tokens", max(self._limit - len(prompts[0]), 1))
        return prompts[0], given

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

    async def _tokens(
        self, param: str, size: int, encode: Callable[[], list[list[int]]], http: HttpRequest
    ) -> list[list[int]]:
        """Prompts as token ids. Long ones are made in a thread, one of those at a time.

        Args:
            param: the field of the body that they come from.
            size: characters.

        Raises:
            ApiError: they cannot be encoded.
            ClientGone: nobody waits for them any more.
        """
        try:
            if size <= LONG_TEXT:
                return encode()
            async with self._tokenizing:
                if await http.is_disconnected():
                    raise ClientGone
                return await asyncio.to_thread(encode)
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from error

    async def _answer(
        self,
        prompts: Sequence[list[int]],
        given: dict[str, Any],
        form: Form,
        body: SamplingFields,
        http: HttpRequest,
        echo: Sequence[str | list[int]] | None = None,
    ) -> Response:
        count = body.n or 1
        told = body.speculation or SpeculationFields()
        named = body.num_logprobs() is not None or told.tokens
        if named and self._names is None:
            self._names = await asyncio.to_thread(self._make_names)
        call = await self._call(prompts, given, body, http, count)
        before = [
            text if isinstance(text, str) else self._decode(text)
            for text in echo or [""] * len(prompts)
            for _ in range(count)
        ]
        options = body.stream_options
        extras = Extras(
            usage=options is not None and options.include_usage,
            usage_so_far=options is not None and options.continuous_usage_stats,
            names=self._names if named else None,
            logprobs=body.num_logprobs() is not None,
            tokens=told.tokens,
            speculation=told.stats,
        )
        texts = [self._text(request) for request in (call.requests if body.stream else ())]
        answer = Answer(call, form, self.model, texts, before, count, extras)
        self._submit(call, given)
        return await _send(answer, bool(body.stream), http)

    async def _call(
        self,
        prompts: Sequence[list[int]],
        given: dict[str, Any],
        body: RequestFields,
        http: HttpRequest,
        count: int = 1,
    ) -> Call:
        """``count`` choices of each prompt, to be handed in."""
        predicted: list[int] = []
        if body.prediction is not None:
            text = joined(body.prediction.content)
            (predicted,) = await self._tokens(
                "prediction", len(text), lambda: [self._continuation(text)], http
            )
        for prompt in prompts:
            self._check_room(prompt, given["max_tokens"])
        requests = await self._of_all_prompts(prompts, given, body, count)
        for request in requests:
            request.predicted = predicted
        return Call(self.engine, self._waker, requests, bool(body.stream))

    def _submit(self, call: Call, given: dict[str, Any]) -> None:
        """Hands a call in; raises ApiError where it is not taken."""
        try:
            call.submit()
        except ValueError as error:
            raise _of_value(error, given) from error
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=1) from error
        except Unavailable as error:
            raise ApiError(503, str(error), retry_after=1) from error

    def _text(self, request: Request) -> TextStream:
        prompt = NewText(self._decode, request.prompt)
        return TextStream(prompt, request.params.stop, self._unsettled)

    async def _of_all_prompts(
        self,
        prompts: Sequence[list[int]],
        given: dict[str, Any],
        body: RequestFields,
        count: int,
    ) -> list[Request]:
        """The requests of all choices. Grammars are compiled in a thread."""

        def make(given: dict[str, Any]) -> list[Request]:
            return [r for prompt in prompts for r in self._requests(prompt, given, body, count)]

        try:
            held_to = body.grammar()
        except GrammarError as error:
            raise ApiError(400, str(error), param=str(error).split(":", 1)[0]) from error
        if held_to is None:
            return make(given)
        field, grammar = held_to
        try:
            async with self._tokenizing:
                return await asyncio.to_thread(make, given | {"grammar": grammar})
        except GrammarError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from error

    def _requests(
        self, prompt: list[int], given: dict[str, Any], body: RequestFields, count: int
    ) -> list[Request]:
        """The choices for a prompt: those of a seed are those of the seeds that follow it."""
        seed = secrets.randbits(64) if body.seed is None else body.seed
        try:
            first = self.pipeline.request(prompt, seed=seed % 2**64, **self._defaults | given)
            requests = [first]
            for i in range(1, count):
                own = (seed + i) % 2**64
                if first.constraint is None:
                    request = Request(prompt, replace(first.params, seed=own), first.forced)
                else:  # each has its own
                    request = self.pipeline.request(prompt, seed=own, **self._defaults | given)
                requests.append(request)
        except GrammarError:
            raise
        except ValueError as error:
            raise _of_value(error, given) from error
        for request in requests:
            request.priority = body.priority
            if body.speculation is not None:
                self._speculate(request, body.speculation)
            if self.settings.request_seconds is not None:
                request.deadline = time.perf_counter() + self.settings.request_seconds
        return requests

    def _continuation(self, text: str) -> list[int]:
        """A text as what follows another."""
        tokenizer = self.pipeline.target.tokenizer
        if tokenizer is None:
            raise ValueError("prediction needs a tokenizer, which the model has not")
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _make_names(self) -> TokenNames:
        target = self.pipeline.target
        if target.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer to name tokens by", param="logprobs")
        return TokenNames(target.tokenizer, target.vocab_size)

    def _speculate(self, request: Request, wanted: SpeculationFields) -> None:
        """Has a request drafted for as it asks."""
        own = self.pipeline.config.draft_mode
        if wanted.mode not in (None, "none", own):
            raise ApiError(
                400,
                f"speculation.mode is {wanted.mode!r}; this server drafts by {own!r}, or not at "
                f"all: 'none'",
                param="speculation.mode",
            )
        drafter = self.pipeline.engine.drafter
        if wanted.k and drafter is not None and not are_chains(drafter.ladder()):
            raise ApiError(
                400,
                f"speculation.k is {wanted.k}; this server drafts trees, all of one depth: leave "
                f"k out, or 0 for no drafts",
                param="speculation.k",
            )
        request.max_draft = 0 if wanted.mode == "none" else wanted.k
        if wanted.policy is not None:
            if self.pipeline.policy.name == "rejection":
                raise ApiError(
                    400,
                    "speculation.policy cannot be chosen where the server's is 'rejection', whose "
                    "drafts are drawn otherwise",
                    param="speculation.policy",
                )
            request.acceptance = (wanted.policy, wanted.threshold)

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


async def _send(answer: Answer | ResponseAnswer, stream: bool, http: HttpRequest) -> Response:
    """The answer, or a stream of it."""
    if stream:
        return EventStream(answer)
    return JSONResponse(await answer.whole(http.receive))


def _of_value(error: ValueError, given: dict[str, Any]) -> ApiError:
    """A value that the pipeline or the engine refuses: their messages begin with its name."""
    param = str(error).split(" ", 1)[0]
    return ApiError(400, str(error), param=param if param in {*given, "prompt"} else None)
