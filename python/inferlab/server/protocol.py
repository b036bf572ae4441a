"""What clients send: OpenAI's fields, and those that vLLM adds and clients know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from inferlab.specdec.grammar import Grammar, GrammarError

MAX_TOKENS = 2**31 - 1
NAMED_STOPS = 16

Text: TypeAlias = Annotated[str, Field()]
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
Unused: TypeAlias = Any
"""Of a field that changes nothing here: who asks, and how the asking is kept."""


class ApiModel(BaseModel):
    """A JSON object of the API. Unknown fields are refused: nothing is ignored in silence."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(ApiModel):
    """What a stream has beside its text."""

    include_usage: bool = False
    include_obfuscation: Unused = None


class JsonSchemaFormat(ApiModel):
    """A JSON schema with a name, as OpenAI writes it. All are held to strictly."""

    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: Unused = None
    strict: bool | None = None


class ResponseFormat(ApiModel):
    """What an answer is to be: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema is given with the type json_schema, and only then")
        return self

    def grammar(self) -> Grammar | None:
        if self.json_schema is not None:
            return Grammar.json_schema(self.json_schema.schema_)
        return Grammar.json_object() if self.type == "json_object" else None


class StructuredOutputs(ApiModel):
    """vLLM's words for the same, and for more. One of them is given."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [v for v in (self.json_, self.regex, self.choice) if v is not None]
        if len(given) + bool(self.json_object) != 1:
            raise ValueError("one of json, regex, choice and json_object must be given")
        return self

    def grammar(self) -> Grammar:
        if self.json_ is not None:
            return Grammar.json_schema(self.json_)
        if self.regex is not None:
            return Grammar.regex(self.regex)
        return Grammar.json_object() if self.choice is None else Grammar.choice(self.choice)


class SamplingFields(ApiModel):
    """What text and chat completions have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=NAMED_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=NAMED_STOPS)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    user: Unused = None
    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        for text in [stop] if isinstance(stop, str) else stop or ():
            if not text:
                raise ValueError("must not be empty")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token in bias or ():
            if not (token.isascii() and token.isdigit() and len(token) < 11):
                raise ValueError(f"{token[:20]!r} is not a token id")
        return bias

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    def grammar(self) -> tuple[str, Grammar] | None:
        """What the answer is held to, behind the name of the field that says so.

        Raises:
            GrammarError: it is no grammar, or there are several. Begins with the field's name.
        """
        makers: dict[str, Callable[[Any], Grammar | None]] = {
            "response_format": ResponseFormat.grammar,
            "structured_outputs": StructuredOutputs.grammar,
            "guided_json": Grammar.json_schema,
            "guided_regex": Grammar.regex,
            "guided_choice": Grammar.choice,
        }
        found: list[tuple[str, Grammar]] = []
        for name, make in makers.items():
            value = getattr(self, name)
            try:
                grammar = None if value is None else make(value)
            except ValueError as error:
                raise GrammarError(f"{name}: {error}") from error
            if grammar is not None:
                found.append((name, grammar))
        if len(found) > 1:
            (first, _), (second, _) = found[:2]
            raise GrammarError(f"{second}: {first} is given, too; an answer has one grammar")
        return found[0] if found else None

    def sampling(self) -> dict[str, Any]:
        """The arguments of `SpeculativePipeline.request` that were given, but the seed."""
        names = (
            *("max_tokens", "min_tokens", "temperature", "top_p", "min_p", "repetition_penalty"),
            *("presence_penalty", "frequency_penalty", "stop", "ignore_eos"),
        )
        given = {name: getattr(self, name) for name in names}
        given["top_k"] = None if self.top_k is None else max(self.top_k, 0)
        given["stop"] = [] if self.stop is None else self.stop
        if self.stop_token_ids is not None:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.logit_bias is not None:
            given["logit_bias"] = {int(token): value for token, value in self.logit_bias.items()}
        return {name: value for name, value in given.items() if value is not None}


class CompletionRequest(SamplingFields):
    """The body of ``/v1/completions``."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported beyond n: ask for n choices and take one")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(ApiModel):
    """A part of a message. Texts are the only ones: nothing is ever fetched."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class ChatMessage(ApiModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def text(self) -> str:
        """Its content, parts joined."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ChatRequest(SamplingFields):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Unused = None

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        return given

    def conversation(self) -> list[dict[str, str]]:
        """The messages for a chat template, contents as texts."""
        return [
            {"role": m.role, "content": m.text()} | ({"name": m.name} if m.name else {})
            for m in self.messages
        ]
