"""What clients send: OpenAI's fields, and those that vLLM adds and clients know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from inferlab.config import MAX_DRAFT
from inferlab.specdec.grammar import Grammar, GrammarError
from inferlab.specdec.policies import Policy
from inferlab.types import LARGEST

MAX_TOKENS = 2**31 - 1
MAX_LOGPROBS = 20
NAMED_STOPS = 16
STOP_CHARACTERS = 1024
BIASED_TOKENS = 1024

TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds: TypeAlias = Annotated[list[TokenId], Field(fail_fast=True)]
StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]
Unused: TypeAlias = Any
"""Of a field that changes nothing here: who asks, and how the asking is kept."""


class ApiModel(BaseModel):
    """A JSON object of the API. Unknown fields are refused: nothing is ignored in silence.

    Lists fail at their first bad entry, objects at their first unknown field: all of what is wrong
    with a body of millions would take gigabytes to say.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in given if isinstance(given, dict) else ():
            if name not in known:
                raise PydanticCustomError("unknown_field", "is not known here", {"field": name})
        return given


class StreamOptions(ApiModel):
    """What a stream has beside its text.

    Attributes:
        include_usage: its end has the usage.
        continuous_usage_stats: every chunk has its choice's usage so far, too, as vLLM has it; not
            without ``include_usage``.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False
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


class SpeculationFields(ApiModel):
    """How one request is to be drafted for (``speculation``, in clients' ``extra_body``).

    Attributes:
        mode: the server's own draft mode, or ``none``.
        k: draft tokens of a step at most, along one path; 0: none.
        policy: another acceptance policy than the server's, and its threshold (tau, k or p).
        stats: what came of it is told under ``metrics`` of the answer.
        tokens: chunks of a stream say of each token whether it was drafted.
    """

    mode: str | None = None
    k: Annotated[int, Field(ge=0, le=MAX_DRAFT)] | None = None
    policy: Literal["longest_prefix", "conf_threshold", "topk_agree", "typical"] | None = None
    threshold: float = 0.0
    stats: bool = False
    tokens: bool = False

    @model_validator(mode="after")
    def _threshold_of_its_policy(self) -> SpeculationFields:
        if self.policy is not None:
            Policy(self.policy, self.threshold)
        return self


class TextPart(ApiModel):
    """A part of a message. Texts are the only ones: nothing is ever fetched."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Prediction(ApiModel):
    """What the client expects the answer to be, mostly (OpenAI's predicted outputs)."""

    type: Literal["content"]
    content: str | list[TextPart]


def joined(content: str | list[TextPart]) -> str:
    """A content as one text."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class RequestFields(ApiModel):
    """What all requests have in common."""

    model: str | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=LARGEST)] | None = None
    top_p: Annotated[float, Field(ge=1 / LARGEST, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1 / LARGEST, le=LARGEST)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=BIASED_TOKENS)
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=NAMED_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=NAMED_STOPS)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    stream: bool | None = None
    speculation: SpeculationFields | None = None
    prediction: Prediction | None = None
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

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _not_too_many(cls, bias: Any) -> Any:
        if isinstance(bias, dict) and len(bias) > BIASED_TOKENS:
            raise ValueError(f"has {len(bias)} entries; {BIASED_TOKENS} are allowed")
        return bias

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token in bias or ():
            if not (token.isascii() and token.isdigit() and len(token) < 11):
                raise ValueError(f"{token[:20]!r} is not a token id")
        return bias

    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside each; None: nothing is."""
        raise NotImplementedError

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
            *("min_tokens", "temperature", "top_p", "min_p", "repetition_penalty"),
            *("presence_penalty", "frequency_penalty", "ignore_eos"),
        )
        given = {name: getattr(self, name) for name in names}
        given["top_k"] = None if self.top_k is None else max(self.top_k, 0)
        given["stop"] = [] if self.stop is None else self.stop
        given["logprobs"] = self.num_logprobs()
        if self.stop_token_ids is not None:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.logit_bias is not None:
            given["logit_bias"] = {int(token): value for token, value in self.logit_bias.items()}
        return {name: value for name, value in given.items() if value is not None}


class SamplingFields(RequestFields):
    """What text and chat completions have in common."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        return given if self.max_tokens is None else {**given, "max_tokens": self.max_tokens}


class CompletionRequest(SamplingFields):
    """The body of ``/v1/completions``."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _supported(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported beyond n: ask for n choices and take one")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs do not go together: prompts are not scored")
        return self

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class ChatMessage(ApiModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def text(self) -> str:
        """Its content, parts joined."""
        return joined(self.content or "")


class ChatRequest(SamplingFields):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Unused = None

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        return given

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _logprobs_go_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    def conversation(self) -> list[dict[str, str]]:
        """The messages for a chat template, contents as texts."""
        return [
            {"role": m.role, "content": m.text()} | ({"name": m.name} if m.name else {})
            for m in self.messages
        ]
