"""LangChain's client of OpenAI's API, unchanged, before the real server."""

from __future__ import annotations

import asyncio

import pydantic
import pytest

from helpers.served import Served, chat_model
from inferlab import SpeculativePipeline

pytestmark = pytest.mark.network
langchain = pytest.importorskip("langchain_openai")

SAID = [("system", "be brief"), ("user", "hello")]
TEXT = "# system: be brief\n# user: hello\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = str(chat_model(tmp_path_factory.mktemp("chat")))
    with Served("--base-model", model, "--served-model-name", "tiny") as served:
        yield served


def chat_of(server, **given):
    return langchain.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="any", model="tiny", max_retries=0, **given
    )


def test_it_asks_and_streams_what_the_pipeline_decodes(server):
    plain = SpeculativePipeline(draft_mode="none")
    expected = plain.generate(TEXT, max_tokens=12, temperature=0.8, seed=3)["text"]
    chat = chat_of(server, max_tokens=12, temperature=0.8, seed=3)
    answer = chat.invoke(SAID)
    assert answer.content == expected
    assert answer.usage_metadata["output_tokens"] == 12
    assert answer.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in chat.stream(SAID)) == expected
    assert [one.content for one in chat.batch([SAID, SAID])] == [expected] * 2
    assert asyncio.run(chat.ainvoke(SAID)).content == expected


def test_its_structured_output_is_held_to_the_schema(server):
    class Point(pydantic.BaseModel):
        """A point."""

        x: int = pydantic.Field(ge=0, le=9)
        name: str = pydantic.Field(max_length=5)

    seed = {"seed": 1}
    for given in (seed, {"use_responses_api": True, "extra_body": seed}):
        held = chat_of(server, **given).with_structured_output(Point, method="json_schema")
        assert isinstance(held.invoke("data"), Point)


def test_its_text_completions_and_its_errors(server):
    plain = SpeculativePipeline(draft_mode="none")
    asks = langchain.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", model="tiny", max_tokens=12, temperature=0
    )
    assert asks.invoke("class Stack:") == plain.generate("class Stack:", max_tokens=12)["text"]
    with pytest.raises(Exception, match="maximum context length is 1024"):
        chat_of(server, max_tokens=100_000).invoke(SAID)
