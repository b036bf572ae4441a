"""The OpenAI-compatible server, as a real process: what it answers, and with whose words."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys

import httpx
import openai
import pytest
import torch

from helpers.browser import CHROMIUM, Page
from helpers.served import Served, chat_model
from inferlab import SpeculativePipeline

pytestmark = pytest.mark.network

PROMPT = "class Stack:"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def server(model):
    with Served("--base-model", str(model), "--served-model-name", "tiny") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def plain():
    return SpeculativePipeline(draft_mode="none")


def test_a_completion_is_what_the_pipeline_decodes_plainly(client, plain):
    expected = plain.generate(PROMPT, max_tokens=40)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0)
    assert answer.choices[0].text == expected["text"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(plain.encode(PROMPT))
    assert answer.usage.completion_tokens == 40


def test_a_stream_has_the_same_text_and_its_usage_at_the_end(client, plain):
    sampling = {"max_tokens": 40, "temperature": 0.8, "top_p": 0.9, "seed": 7}
    expected = plain.generate(PROMPT, **sampling)
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **sampling
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == expected["text"]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 40


def test_chunks_tell_the_usage_so_far(server, plain):
    body = {"max_tokens": 20, "n": 2, "seed": 5, "temperature": 1, "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = server.complete(**body, stream_options=options).text
    lines = [
        line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")
    ]
    *chunks, last = map(json.loads, lines)
    prompt = len(plain.encode(PROMPT))
    for index in range(2):
        told = [c["usage"] for c in chunks if c["choices"][0]["index"] == index]
        counts = [usage["completion_tokens"] for usage in told]
        assert counts == sorted(counts)
        assert 0 < counts[0] < counts[-1] == 20
        assert {u["total_tokens"] - u["completion_tokens"] for u in told} == {prompt}
    assert last["usage"]["completion_tokens"] == 40
    without = server.complete(**body, stream_options={"continuous_usage_stats": True}).text
    assert "usage" not in without


def test_choices_have_the_seeds_that_follow(client, plain):
    answer = client.completions.create(
        model="tiny", prompt=[PROMPT, "import os"], n=2, max_tokens=12, temperature=1, seed=5
    )
    expected = [
        plain.generate(prompt, max_tokens=12, temperature=1.0, seed=seed)["text"]
        for prompt in (PROMPT, "import os")
        for seed in (5, 6)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    prompts = sum(len(plain.encode(p)) for p in (PROMPT, "import os"))
    assert answer.usage.prompt_tokens == prompts


def test_a_chat_goes_through_the_template(client, plain):
    messages = [{"role": "user", "content": "hello"}]
    expected = plain.generate("# user: hello\n", max_tokens=12)["text"]
    for content in ("hello", [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]):
        messages[0]["content"] = content
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=12, temperature=0
        )
        assert answer.choices[0].message.content == expected
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == expected
    assert [c.delta.role for c in chunks].count("assistant") == 1
    assert chunks[-1].finish_reason == "length"


def test_a_response_is_the_chat_in_another_form(client, plain):
    expected = plain.generate("# system: be brief\n# user: hello\n", max_tokens=12)["text"]
    given = {
        "model": "tiny",
        "instructions": "be brief",
        "max_output_tokens": 12,
        "temperature": 0,
    }
    whole = client.responses.create(input="hello", **given)
    assert whole.output_text == expected
    assert whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 12
    messages = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    events = list(client.responses.create(input=messages, stream=True, **given))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == expected
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    assert events[-1].response.output_text == expected
    stop = expected[len(expected) // 2 :][:3]
    with client.responses.stream(input="hello", **given, extra_body={"stop": stop}) as stream:
        ended = stream.get_final_response()
    assert ended.status == "completed"
    assert ended.output_text == expected[: expected.index(stop)]


def test_stop_strings_end_and_are_cut_in_streams_too(client):
    given = {"model": "tiny", "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
    whole = client.completions.create(**given, stop=["class that", "zzz"])
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].text.endswith("The class is a ")
    pieces = client.completions.create(**given, stop=["class that"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text


def test_echo_puts_the_prompt_in_front(client):
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, echo=True
    )
    assert answer.choices[0].text.startswith(PROMPT + "\n")


def test_many_at_a_time_answer_as_one_alone(server, plain):
    bodies = [
        {"prompt": f"def f{i}(", "max_tokens": 8 + i, "temperature": 0.7, "seed": i}
        for i in range(24)
    ]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: server.complete(**body).json(), bodies))
    for body, answer in zip(bodies, answers, strict=True):
        expected = plain.generate(
            body["prompt"], max_tokens=body["max_tokens"], temperature=0.7, seed=body["seed"]
        )
        assert answer["choices"][0]["text"] == expected["text"]
    server.wait_until_idle()


def log_probabilities(plain, prompt, tokens):
    """By the model's own forward: [len(tokens), V]."""
    ids = torch.tensor([[*plain.encode(prompt), *tokens]])
    with plain.target.plain() as model, torch.no_grad():
        logits = model(ids).logits[0, -len(tokens) - 1 : -1].float()
    return torch.log_softmax(logits, dim=-1)


def test_log_probabilities_are_the_models_own(client, plain):
    sampling = {"temperature": 0.7, "seed": 3, "max_tokens": 24}
    tokens = plain.generate(PROMPT, **sampling)["token_ids"]
    scores = log_probabilities(plain, PROMPT, tokens)
    expected = scores[range(len(tokens)), tokens]
    answer = client.completions.create(model="tiny", prompt=PROMPT, logprobs=3, **sampling)
    told = answer.choices[0].logprobs
    assert "".join(told.tokens) == answer.choices[0].text
    assert told.token_logprobs == pytest.approx(expected.tolist(), abs=0.1)
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(tokens))]
    best = scores.topk(3).values
    for values, top, name, own in zip(
        best, told.top_logprobs, told.tokens, told.token_logprobs, strict=True
    ):
        assert sorted(top.values(), reverse=True) == pytest.approx(values.tolist(), abs=0.4)  # bf16
        assert top.get(name, own) == own
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, logprobs=3, stream=True, **sampling
    )
    parts = [chunk.choices[0].logprobs for chunk in stream if chunk.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for part in parts for value in getattr(part, name)]
        assert joined == getattr(told, name)


def test_a_chat_tells_log_probabilities_too(client):
    given = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
    }
    whole = client.chat.completions.create(**given, top_logprobs=2).choices[0]
    told = whole.logprobs.content
    assert b"".join(bytes(one.bytes) for one in told).decode() == whole.message.content
    for one in told:
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].token == one.token, "greedy"
        assert one.top_logprobs[0].logprob == one.logprob
    assert all(not one.top_logprobs for one in
               client.chat.completions.create(**given).choices[0].logprobs.content)  # fmt: skip


@pytest.fixture(scope="module")
def always_drafting():
    with Served("--K", "4") as served:
        yield served


def test_a_request_says_how_it_is_drafted_for(always_drafting, plain):
    text = plain.generate(PROMPT, max_tokens=48)["text"]

    def run(**speculation):
        asked = {**speculation, "stats": True}
        answer = always_drafting.complete(max_tokens=48, speculation=asked).json()
        return answer["choices"][0]["text"], answer["metrics"]["speculative_decoding"]

    drafted, stats = run()
    assert drafted == text
    assert stats["num_draft_tokens"] >= stats["num_accepted_draft_tokens"] > 0
    assert sum(stats["acceptance_histogram"]) == stats["num_spec_steps"]
    weighted = sum(j * n for j, n in enumerate(stats["acceptance_histogram"]))
    assert weighted == stats["num_accepted_draft_tokens"]
    for none in ({"mode": "none"}, {"k": 0}):
        drafted, stats = run(**none)
        assert drafted == text
        assert (stats["num_draft_tokens"], stats["num_steps"]) == (0, 48)
    drafted, stats = run(k=1)
    assert drafted == text
    assert stats["num_spec_tokens"] == 1
    drafted, stats = run(policy="topk_agree", threshold=400)
    assert drafted != text, "nearly every draft is taken"
    refused = always_drafting.complete(speculation={"mode": "eagle"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "speculation.mode"


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_the_page_shows_how_each_token_came(always_drafting):
    answer = always_drafting.complete(max_tokens=40, speculation={"stats": True}).json()
    stats = answer["metrics"]["speculative_decoding"]
    with Page(f"{always_drafting.url}/?prompt=class%20Stack%3A&max_tokens=40") as page:
        assert page.wait_for("document.body.dataset.done") == "40"
        spans = "[...document.querySelectorAll('#out span')]"
        shown = page.value(f"{spans}.map(s => s.textContent).join('')")
        assert shown == answer["choices"][0]["text"]
        kinds = page.value(f"{spans}.map(s => s.className)")
        assert kinds.count("drafted") == stats["num_accepted_draft_tokens"] > 0
        assert kinds.count("own") == stats["num_steps"]
        told = page.value("document.getElementById('figures').textContent")
        assert f"accepted length {stats['tokens_per_step']:.2f}" in told
        assert page.wait_for("document.getElementById('model').textContent") == "inferlab/tiny"
        page.value("document.getElementById('max_tokens').value = 5000")
        page.value("document.getElementById('go').click()")
        refused = page.wait_for("document.querySelector('.error')?.textContent")
        assert "maximum context length" in refused


def test_what_a_client_predicts_is_drafted(plain):
    """The answer itself as its prediction, with one line changed."""
    expected = plain.generate("def read_config(path):", max_tokens=96)["text"]
    lines = expected.split("\n")
    lines[len(lines) // 2] = "    zzz = 1"
    predicted = "\n".join(lines)
    with Served("--draft-mode", "ngram", "--K", "6") as served:
        steps = []
        for prediction in (None, {"type": "content", "content": predicted}):
            answer = served.complete(
                prompt="def read_config(path):",
                max_tokens=96,
                prediction=prediction,
                speculation={"stats": True},
            ).json()
            assert answer["choices"][0]["text"] == expected
            steps.append(answer["metrics"]["speculative_decoding"]["num_steps"])
            details = answer["usage"]["completion_tokens_details"]
        assert steps[1] < steps[0]
        assert details["accepted_prediction_tokens"] == 96 - steps[1]
        assert details["rejected_prediction_tokens"] > 0


def test_a_beginning_that_was_read_before_is_not_read_again(server):
    prompt = "import os\nimport sys\n\n\ndef read_all(path):\n    " * 3
    usage = [server.complete(prompt=prompt, seed=i).json()["usage"] for i in range(2)]
    first, second = (u["prompt_tokens_details"]["cached_tokens"] for u in usage)
    assert first == 0
    assert second >= usage[0]["prompt_tokens"] - 17
    assert server.metric("vllm:prefix_cache_hits_total") >= second


def test_models_health_and_figures(server, client):
    assert "<title>LLM Inference Lab</title>" in server.http.get("/").text
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 1024)
    assert client.models.retrieve("tiny").id == "tiny"
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/ready").status_code == 200
    before = server.metric("vllm:generation_tokens_total")
    server.complete(max_tokens=9)
    assert server.metric("vllm:generation_tokens_total") == before + 9
    assert server.metric("vllm:e2e_request_latency_seconds_count") >= 1


def test_the_bundled_model_goes_on_with_a_message_as_with_a_text(always_drafting, plain):
    """So the commands that know nothing but chats, the seed's, can ask it."""
    parts = httpx.URL(always_drafting.url)
    server = ["--host", parts.host, "--port", str(parts.port), "--prompt", PROMPT, "--json"]
    for command in (["server.ping_vllm"], ["benchmarks.run_bench", "--mode", "http"]):
        done = subprocess.run(
            [sys.executable, "-m", f"inferlab.{command[0]}", *command[1:], *server,
             "--temperature", "0"],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        record = (found if "record" in found else found["raw_results"][0])["record"]
        assert record["text"] == plain.generate(PROMPT, max_tokens=record["num_tokens"])["text"]


def test_a_request_that_takes_too_long_ends():
    with Served("--request-seconds", "0.001") as served:
        answer = served.complete(max_tokens=900, ignore_eos=True)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        served.wait_until_idle()


def test_the_document_describes_the_bodies(server):
    document = server.http.get("/openapi.json").json()
    text = json.dumps(document)
    for name in ("CompletionRequest", "ChatRequest", "ChatMessage", "ResponsesRequest"):
        assert name in document["components"]["schemas"]
    for reference in {
        part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]
    }:
        assert reference in document["components"]["schemas"]
