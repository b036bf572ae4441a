"""Structured output over HTTP: response_format, and vLLM's words for it."""

from __future__ import annotations

import concurrent.futures
import json
import re
import time

import jsonschema
import openai
import pydantic
import pytest

from helpers.served import Served, chat_model
from inferlab import SpeculativePipeline
from inferlab.specdec.grammar import Grammar

pytestmark = pytest.mark.network

TEMPLATE = "{% for message in messages %}# {{ message['content'] }}\n{% endfor %}"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["list", "dict"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "size"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "data"}]
HELD = {
    "type": "json_schema",
    "json_schema": {"name": "data", "schema": SCHEMA, "strict": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("chat"), TEMPLATE)


@pytest.fixture(scope="module")
def server(model):
    with Served("--base-model", str(model), "--served-model-name", "tiny", "--k", "4") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def plain():
    return SpeculativePipeline(draft_mode="none")


def test_a_chat_is_held_to_a_schema(client, plain):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=HELD, seed=3, n=4, max_tokens=90
    )
    for seed, choice in enumerate(answer.choices, 3):
        expected = plain.generate(
            "# data\n",
            max_tokens=90,
            temperature=1.0,
            seed=seed,
            grammar=Grammar.json_schema(SCHEMA),
        )
        assert choice.message.content == expected["text"]
        assert choice.finish_reason == expected["finish_reason"]
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert "stop" in {choice.finish_reason for choice in answer.choices}


def test_a_stream_is_held_to_it_too(client):
    given = {"model": "tiny", "messages": MESSAGES, "seed": 3, "max_tokens": 90}
    whole = client.chat.completions.create(**given, response_format=HELD).choices[0]
    stream = client.chat.completions.create(**given, response_format=HELD, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].finish_reason == whole.finish_reason
    jsonschema.validate(json.loads(whole.message.content), SCHEMA)


class Point(pydantic.BaseModel):
    x: int = pydantic.Field(ge=0, le=9)
    name: str = pydantic.Field(max_length=5)


def test_a_pydantic_model_is_parsed(client):
    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Point, seed=1, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_a_response_is_held_to_it_too(client):
    held = {"type": "json_schema", "name": "data", "schema": SCHEMA, "strict": True}
    asked = dict(model="tiny", input=MESSAGES, max_output_tokens=90, temperature=0.0)
    answer = client.responses.create(text={"format": held}, **asked)
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=HELD, max_tokens=90, temperature=0.0
    )
    assert answer.output_text == chat.choices[0].message.content
    assert answer.text.format.to_dict() == held
    with client.responses.stream(text={"format": held}, **asked) as stream:
        assert stream.get_final_response().output_text == answer.output_text
    parsed = client.responses.parse(
        model="tiny", input=MESSAGES, text_format=Point, extra_body={"seed": 1}
    )
    assert isinstance(parsed.output_parsed, Point)
    free = client.responses.create(text={"format": {"type": "json_object"}}, **asked)
    assert free.output_text.startswith("{")
    with pytest.raises(openai.BadRequestError, match=r"text.*response_format"):
        client.responses.create(
            text={"format": held}, extra_body={"response_format": {"type": "json_object"}}, **asked
        )


def test_text_and_any_object(client):
    given = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    free = client.chat.completions.create(**given).choices[0].message.content
    text = client.chat.completions.create(**given, response_format={"type": "text"})
    assert text.choices[0].message.content == free
    held = client.chat.completions.create(**given, response_format={"type": "json_object"})
    assert held.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{5}"}}, "[a-c]{5}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"json": {"enum": [1, 2]}}}, "1|2"),
        ({"structured_outputs": {"json": '{"const": "a"}'}}, '"a"'),
        ({"structured_outputs": {"json_object": True}, "max_tokens": 8}, r"(?s:\{.*)"),
        ({"guided_json": {"enum": [1, 2]}}, "1|2"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 8}, r"(?s:\{.*)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_text_completions_and_the_words_of_vllm(server, body, pattern):
    choice = server.complete(**{"temperature": 1, "seed": 2} | body).json()["choices"][0]
    assert re.fullmatch(pattern, choice["text"]), choice
    if "max_tokens" not in body:
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is given"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"not": {}}},
                }
            },
            "response_format",
            "Unimplemented keys",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "one of json, regex"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not a JSON document"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "object"),
        ({"guided_choice": []}, "guided_choice", "must be texts"),
        ({"guided_regex": "a" * 200_000}, "guided_regex", "at most 131072"),
        ({"guided_json": {"multipleOf": 10**6 + 3}}, "guided_json", "multipleOf"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex is given"),
    ],
)
def test_what_is_wrong_is_named_by_its_field(server, body, param, message):
    answer = server.complete(**body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    server.wait_until_idle()


def test_the_loop_goes_on_while_a_large_grammar_is_compiled(server):
    """Many properties take a while; health is asked for meanwhile and answers at once."""
    schema = {
        "type": "object",
        "properties": {
            f"p{i}": {"type": "object", "properties": {f"q{j}": {} for j in range(18)}}
            for i in range(200)
        },
    }
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(server.complete, guided_json=schema | {"title": str(i)}, max_tokens=1)
            for i in range(4)
        ]
        count = 0
        while not all(answer.done() for answer in asked):
            assert server.http.get("/health").status_code == 200
            count += 1
            time.sleep(0.001)
        assert {answer.result().status_code for answer in asked} == {200}
    assert count > 5


def test_held_and_free_requests_share_batches(server, plain):
    bodies = [
        {"prompt": f"f{i} = ", "max_tokens": 30, "temperature": 1, "seed": i}
        | ({"guided_json": SCHEMA} if i % 2 else {})
        for i in range(16)
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: server.complete(**body).json(), bodies))
    for i, (body, answer) in enumerate(zip(bodies, answers, strict=True)):
        grammar = Grammar.json_schema(SCHEMA) if i % 2 else None
        expected = plain.generate(
            body["prompt"], max_tokens=30, temperature=1.0, seed=i, grammar=grammar
        )
        assert answer["choices"][0]["text"] == expected["text"]
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("text", "param"),
    [
        (5, "text"),
        ({"format": "json"}, "text.format"),
        ({"format": {"type": "xml"}}, "text.format"),
        ({"format": {"type": "json_schema", "schema": {}}}, "text.format.name"),
        ({"format": {"type": "json_schema", "name": "a", "schema": "{"}}, "text.format.schema"),
    ],
)
def test_what_is_wrong_with_the_text_of_a_response_is_named_by_its_field(server, text, param):
    answer = server.http.post("/v1/responses", json={"model": "tiny", "input": "a", "text": text})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


def test_a_body_that_is_no_object_is_said_to_be_none(server):
    answer = server.http.post("/v1/responses", json=[1])
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the body must be a JSON object"
