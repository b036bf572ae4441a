"""VLLMPingClient against a real server on the loopback interface, through every fault."""

from __future__ import annotations

import contextlib
import json
import logging

import pytest

from helpers.faulty_server import FaultyServer, Request, Respond, chat, closed_port, delta
from inferlab.client import connection
from inferlab.client.answers import AnswerError, read_stream
from inferlab.client.connection import parse_retry_after, split_base_url
from inferlab.client.ping import VLLMPingClient
from inferlab.client.results import request_record, result_mapping
from inferlab.server import ping_vllm

pytestmark = pytest.mark.network


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with FaultyServer() as running:
        yield running


@pytest.fixture
def connect():
    """VLLMPingClient, closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(VLLMPingClient(*args, **kwargs))


@pytest.fixture
def client(server, connect):
    return connect("127.0.0.1", server.port, retry_delay=0, timeout=10)


# --- answers -------------------------------------------------------------------------------------


def test_chat_result_has_the_documented_keys(server, client):
    server.answers = [Respond.json(chat())]
    result = client.generate("Hi", max_tokens=7, temperature=0.5, seed=3)
    assert result["success"] is True
    assert result["generated_text"] == "Hello there"
    assert result["tokens_generated"] == 7
    assert result["tokens_counted_by"] == "usage"
    assert result["prompt_tokens"] == 3
    assert result["finish_reason"] == "stop"
    assert result["model"] == "first"
    assert result["prompt"] == "Hi"
    assert result["raw_response"] == chat()
    assert result["attempts"] == 1
    assert result["latency_ms"] > 0
    assert "ttft_ms" not in result
    sent = server.posts[0]
    assert sent.path == "/v1/chat/completions"
    assert sent.payload == {
        "model": "first",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
    }


def test_completions_sends_the_prompt_as_it_is(server, client):
    server.answers = [Respond.json({"choices": [{"text": " x, y", "finish_reason": "length"}]})]
    result = client.generate("def f(", endpoint="completions", extra_body={"top_k": 5})
    assert result["generated_text"] == " x, y"
    assert result["tokens_generated"] == 2
    assert result["tokens_counted_by"] == "words"
    assert server.posts[0].path == "/v1/completions"
    assert server.posts[0].payload["prompt"] == "def f("
    assert server.posts[0].payload["top_k"] == 5
    assert "messages" not in server.posts[0].payload


def test_the_model_is_asked_for_once_and_only_if_not_given(server, client):
    server.answers = [Respond.json(chat())]
    client.generate("a", model="mine")
    assert [request.path for request in server.requests] == ["/v1/chat/completions"]
    client.generate("b")
    client.generate("c")
    assert [request.payload["model"] for request in server.posts] == ["mine", "first", "first"]
    assert [request.path for request in server.requests].count("/v1/models") == 1


@pytest.mark.parametrize("models", [Respond.json({"data": []}), Respond(b"", 404)])
def test_a_server_without_a_list_of_models_is_asked_without_one(server, client, models):
    server.models = models
    server.answers = [Respond.json(chat(model="its own"))]
    result = client.generate("a")
    assert "model" not in server.posts[0].payload
    assert result["model"] == "its own"


def test_an_unreadable_list_of_models_is_a_failure(server, client):
    server.models = Respond(b"{", 200)
    server.answers = [Respond.json(chat())]
    result = client.generate("a")
    assert result["success"] is False
    assert "no model is given" in result["error"]
    assert "not JSON" in result["error"]
    assert not server.posts


# --- faults --------------------------------------------------------------------------------------

BODY = json.dumps(chat()).encode()
ROLE_ONLY = delta(role="assistant", content="")

FAULTS = {
    "http error": (
        Respond.json({"error": {"message": "no such model", "type": "NotFound"}}, 404),
        "HTTP 404: no such model",
    ),
    "http error in FastAPI's shape": (Respond.json({"detail": "bad field"}, 422), "bad field"),
    "redirect": (Respond(b"", 307, {"Location": "https://elsewhere/v1"}), "https://elsewhere/v1"),
    "204": (Respond(b"", 204), "HTTP 204"),
    "error body under 200": (
        Respond.json({"error": {"message": "out of memory"}}),
        "out of memory",
    ),
    "vLLM's old error body under 200": (
        Respond.json({"object": "error", "message": "too long", "code": 400}),
        "too long",
    ),
    "empty body": (Respond(b""), "the answer is empty"),
    "neither text nor an end": (
        Respond.json({"choices": [{"message": {"content": ""}}]}),
        "the answer is empty",
    ),
    "choices null": (Respond.json(chat(choices=None)), "no choices"),
    "reasoning only": (
        Respond.json(
            {"choices": [{"message": {"content": None, "reasoning_content": "hm"}}]},
        ),
        "only reasoning",
    ),
    "reasoning cut short": (
        Respond.json(
            {"choices": [{"message": {"reasoning": "hm"}, "finish_reason": "length"}]},
        ),
        "only reasoning",
    ),
    "half of a pair in an error": (
        Respond.json({"error": {"message": "no \ud83d"}}, 400),
        "HTTP 400: no \ufffd",
    ),
    "no choices": (Respond.json(chat(choices=[])), "no choices"),
    "choices of another shape": (Respond.json(chat(choices="x")), "unknown shape"),
    "broken JSON": (Respond(BODY[:-9]), "not JSON"),
    "not text": (Respond(b"\xff\xfe\x00"), "not JSON"),
    "nested beyond reason": (Respond(b"[" * 100_000), "not JSON"),
    "not an object": (Respond(b"[1]"), "not a JSON object"),
    "html": (Respond(b"<html>Bad gateway</html>"), "not JSON"),
    "truncated by Content-Length": (Respond(BODY, length=len(BODY) + 100), "broke"),
    "truncated, length unknown": (Respond(BODY[:40], length=-1), "not JSON"),
    "broken compression": (Respond(b"not gzip", headers={"Content-Encoding": "gzip"}), "broke"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported_and_not_tried_again(server, client, fault):
    answer, reason = FAULTS[fault]
    server.answers = [answer]
    result = client.generate("Hi")
    assert result["success"] is False
    assert reason in result["error"]
    assert result["latency_ms"] > 0
    assert "generated_text" not in result
    assert result["attempts"] == 1
    assert len(server.posts) == 1


STREAM_FAULTS = {
    "error event behind text": (
        [
            ROLE_ONLY,
            delta(content="Hel"),
            {"error": {"message": "engine died"}},
            "data: [DONE]\n\n",
        ],
        "engine died",
    ),
    "named error event": (
        [delta(content="Hel"), 'event: error\ndata: {"message": "overloaded"}\n\n'],
        "overloaded",
    ),
    "role and [DONE] only": ([ROLE_ONLY, "data: [DONE]\n\n"], "the answer is empty"),
    "one JSON body with an error": (['{"error": "no streams here"}'], "no streams here"),
    "no event": ([], "ended early"),
    "closed midway": ([ROLE_ONLY, delta(content="Hel")], "ended early, after 1 chunks"),
    "broken JSON": ([delta(content="Hel"), "data: {\n\n"], "not JSON"),
    "cut inside an event": ([delta(content="Hel"), 'data: {"choices": [{"del'], "not JSON"),
}


@pytest.mark.parametrize("fault", STREAM_FAULTS)
def test_fault_in_a_stream_is_no_success(server, client, fault):
    events, reason = STREAM_FAULTS[fault]
    server.answers = [Respond.events(*events)]
    result = client.generate("Hi", stream=True)
    assert result["success"] is False
    assert reason in result["error"]
    assert "ttft_ms" not in result


def test_refused_connection_is_tried_again_with_back_off(monkeypatch, connect):
    waits: list[float] = []
    monkeypatch.setattr(connection.time, "sleep", waits.append)
    with closed_port() as port:
        client = connect("127.0.0.1", port, retry_attempts=4, retry_delay=0.5)
        result = client.generate("Hi", model="m")
        assert result["success"] is False
        assert f"cannot connect to http://127.0.0.1:{port}" in result["error"]
        assert result["attempts"] == 4
        assert waits == [0.5, 1.0, 2.0]
        assert client.ping() is False
        assert client.get_models()["success"] is False


def test_slow_answer_is_a_timeout_and_not_sent_twice(server, connect):
    server.answers = [Respond([5.0, BODY])]
    client = connect("127.0.0.1", server.port, timeout=0.5, model="m", retry_delay=0)
    result = client.generate("Hi")
    assert result["success"] is False
    assert "timeout" in result["error"]
    assert len(server.posts) <= 1


def test_dripping_answer_times_out_as_a_whole(server, connect):
    """Each chunk comes in time, all of them together do not."""
    server.answers = [Respond([b" ", 0.05] * 40 + [BODY])]
    client = connect("127.0.0.1", server.port, timeout=0.3, model="m", retry_delay=0)
    result = client.generate("Hi")
    assert result["success"] is False
    assert "timeout" in result["error"]


# --- retries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_tried_again(server, client, status):
    server.answers = [Respond(b"busy", status), Respond.json(chat())]
    result = client.generate("Hi")
    assert result["success"] is True
    assert result["attempts"] == 2
    assert len(server.posts) == 2


def test_a_connection_closed_before_any_answer_is_tried_again(server, client):
    server.answers = [Respond(hang_up=True), Respond(hang_up=True), Respond.json(chat())]
    assert client.generate("Hi")["attempts"] == 3
    server.answers = [Respond(hang_up=True)]
    result = client.generate("Hi")
    assert result["success"] is False
    assert "broke" in result["error"]
    assert result["attempts"] == 3


def test_tries_end_and_the_last_reason_is_told(server, client):
    server.answers = [Respond(b"busy", 503)]
    result = client.generate("Hi")
    assert result["success"] is False
    assert result["error"] == "HTTP 503: busy"
    assert result["attempts"] == len(server.posts) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_tried_again(server, client, status):
    server.answers = [Respond(b"no", status), Respond.json(chat())]
    result = client.generate("Hi")
    assert result["success"] is False
    assert result["status_code"] == status
    assert len(server.posts) == 1


def test_retry_after_beats_the_back_off(server, client, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(connection.time, "sleep", waits.append)
    server.answers = [
        Respond(b"busy", 429, {"Retry-After": "7"}),
        Respond(b"busy", 503, {"Retry-After": "nonsense"}),
        Respond.json(chat()),
    ]
    assert client.generate("Hi")["attempts"] == 3
    assert waits == [7.0, 0.0]


def test_a_retry_after_of_an_hour_is_not_waited_for(server, client):
    server.answers = [Respond(b"quota", 429, {"Retry-After": "3600"})]
    result = client.generate("Hi")
    assert result["success"] is False
    assert "3600 s" in result["error"]
    assert len(server.posts) == 1


def test_retry_after_dates():
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT", now=1445412470.0) == 10.0
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT", now=1445500000.0) == 0.0
    assert parse_retry_after("2.5") == 2.5
    assert parse_retry_after("soon") is None
    assert parse_retry_after(None) is None


# --- streams -------------------------------------------------------------------------------------


def test_stream_is_put_together(server, client):
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    server.answers = [
        Respond.events(
            ": keep-alive\n\n", ROLE_ONLY, delta(content="Hel"), delta(content="lo\u2028 "),
            delta(content="", finish_reason="stop"), {"choices": [], "usage": usage},
            "data: [DONE]\r\n\r\n",
        )
    ]  # fmt: skip
    result = client.generate("Hi", stream=True)
    assert result["success"] is True
    assert result["generated_text"] == "Hello\u2028 "
    assert result["tokens_generated"] == 5
    assert result["finish_reason"] == "stop"
    assert result["raw_response"]["choices"][0]["message"]["content"] == "Hello\u2028 "
    assert server.posts[0].payload["stream"] is True
    assert server.posts[0].payload["stream_options"] == {"include_usage": True}


def test_ttft_and_itl_count_chunks_with_text_only():
    """The clock is read once per chunk with text: 5 s, 6 s and 9 s after the start."""
    ticks = iter([5.0, 6.0, 9.0])
    events = [
        ROLE_ONLY,
        delta(content="a"),
        delta(content="b"),
        delta(content="c"),
        delta("length"),
    ]
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    one_byte_each = (body[i : i + 1] for i in range(len(body)))
    answer = read_stream(one_byte_each, clock=lambda: next(ticks))
    assert answer.text_times == [5.0, 6.0, 9.0]
    reply = connection.Reply(value=answer, started=1.0, latency_ms=9000.0)
    asked = {"max_tokens": 9, "temperature": 0.0, "stream": True}
    record = request_record(reply, asked, prompt="Hi", server="http://h", endpoint="chat")
    described = result_mapping(record, answer.raw)
    assert described["ttft_ms"] == 4000.0
    assert described["itl_ms"] == [1000.0, 3000.0]
    assert described["tpot_ms"] == 2000.0
    assert described["tokens_counted_by"] == "chunks"
    assert described["tokens_generated"] == 3


def test_ttft_waits_for_text_that_comes_late(server, client):
    server.answers = [Respond.events(ROLE_ONLY, 0.2, delta(content="x"), delta("stop"))]
    result = client.generate("Hi", stream=True)
    assert result["ttft_ms"] >= 195
    assert result["itl_ms"] == []
    assert result["tpot_ms"] is None
    assert result["ttft_ms"] <= result["latency_ms"]


def test_stream_without_finish_reason_needs_done():
    chunk = b'data: {"choices": [{"text": "x"}]}\n\n'
    assert read_stream([chunk, b"data: [DONE]\n\n"]).text == "x"
    with pytest.raises(AnswerError, match="ended early"):
        read_stream([chunk])


TEXT = delta(content="Hel")
REST = delta("stop", content="lo")
DONE = "data: [DONE]\n\n"
PAIR = '{"choices": [{"delta": {"content": "%s"}, "finish_reason": %s}]}'

STREAMS = {
    "comments": [": one\n", TEXT, ":\n\n", REST, DONE],
    "id and retry": ["id: 1\nretry: 10\n", TEXT, "id\n", REST, DONE],
    "empty data": ["data:\n\n", TEXT, "data\n\n", "data:  \n\n", REST, DONE],
    "ping": [TEXT, "event: ping\ndata: 2026-11-26\n\n", "event: ping\ndata: {}\n\n", REST],
    "CR": [json.dumps(TEXT).join(["data: ", "\r\r"]), json.dumps(REST).join(["data:", "\r\r"])],
    "byte-order mark": ["\ufeff", TEXT, REST, DONE],
    "[DONE] and blanks": [TEXT, delta(content="lo"), "data:  [DONE] \n\n"],
    "[DONE] without its empty line": [TEXT, delta(content="lo"), "data: [DONE]"],
    "junk behind [DONE]": [TEXT, REST, DONE, "junk\n\ndata: {\n\n", {"error": "late"}],
    "null": [{"choices": None, "usage": None, "error": None}, TEXT, REST, DONE],
    "parts": [
        delta(content=[{"type": "text", "text": "H"}, "e"]),
        delta(content=[{"type": "text", "text": "l"}, {"type": "image_url", "image_url": {}}]),
        REST,
    ],
    "text beside an empty delta": [{"choices": [{"delta": {}, "text": "Hel"}]}, REST],
    "events of a type": [f"event: message\ndata: {json.dumps(TEXT)}\n\n", REST],
}


@pytest.mark.parametrize("how", STREAMS)
def test_streams_as_servers_send_them(server, client, how):
    server.answers = [Respond.events(*STREAMS[how])]
    result = client.generate("Hi", stream=True)
    assert result["success"] is True, result
    assert result["generated_text"] == "Hello"
    assert result["tokens_counted_by"] == "chunks"
    assert len(result["itl_ms"]) == result["tokens_generated"] - 1


def test_halves_of_a_surrogate_pair_meet(server, client):
    halves = [f"data: {PAIR % text}\n\n" for text in (("\\ud83c", "null"), ("\\udf0d", '"stop"'))]
    server.answers = [Respond.events(*halves)]
    result = client.generate("Hi", stream=True)
    assert result["generated_text"] == "\U0001f30d"
    assert result["raw_response"]["choices"][0]["message"]["content"] == "\U0001f30d"
    server.answers = [Respond.events(halves[0], delta("stop"))]
    assert client.generate("Hi", stream=True)["generated_text"] == "\ufffd"
    server.answers = [Respond.json(chat("x\ud83cy"))]
    assert client.generate("Hi")["generated_text"] == "x\ufffdy"


@pytest.mark.parametrize("mark", ["", "\n  ", "\ufeff"])
def test_one_json_body_where_a_stream_was_asked_for(server, client, mark):
    """Its text came at one time: there is a TTFT, and nothing to take a TPOT from."""
    server.answers = [Respond.events(mark + json.dumps(chat(), indent=1))]
    result = client.generate("Hi", stream=True)
    assert result["generated_text"] == "Hello there"
    assert (result["tokens_generated"], result["tokens_counted_by"]) == (7, "usage")
    assert 0 < result["ttft_ms"] <= result["latency_ms"]
    assert (result["itl_ms"], result["tpot_ms"]) == ([], None)
    server.answers = [Respond.events(json.dumps(chat(usage=None)))]
    assert client.generate("Hi", stream=True)["tokens_counted_by"] == "words"


def test_parts_of_a_whole_answer(server, client):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hello"}]
    server.answers = [Respond.json(chat(parts))]
    assert client.generate("Hi")["generated_text"] == "Hello"


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_answer_that_is_finished_is_an_answer(server, client, capsys, stream):
    whole = Respond.json(chat("", usage=None))
    server.answers = [Respond.events(ROLE_ONLY, delta("stop"), DONE) if stream else whole]
    result = client.generate("Hi", stream=stream)
    assert result["success"] is True
    assert (result["generated_text"], result["tokens_generated"]) == ("", 0)
    assert result["finish_reason"] == "stop"
    if stream:
        assert (result["ttft_ms"], result["itl_ms"], result["tpot_ms"]) == (None, [], None)
    command = ["--base-url", server.url, "--prompt", "Hi", *(["--stream"] if stream else [])]
    assert ping_vllm.main(command) == 0
    assert capsys.readouterr().out == "\n"
    server.answers = [Respond.json(chat(None))]
    assert client.generate("Hi")["success"] is True


def test_stream_options_are_left_out_where_the_server_refuses_them(server, client):
    def answer(request: Request) -> Respond:
        if "stream_options" in request.payload:
            return Respond.json({"error": "unknown field stream_options"}, 400)
        return Respond.events(delta(content="x"), delta("stop"))

    server.answers = [answer]
    assert client.generate("Hi", stream=True)["generated_text"] == "x"


# --- ping, models, key, arguments ----------------------------------------------------------------


def test_ping(server, client):
    assert client.ping() is True
    server.health = Respond(b"loading", 503)
    assert client.ping() is False
    assert [request.path for request in server.requests] == ["/health", "/health"]


def test_ping_without_health_asks_for_the_models(server, client):
    server.health = Respond(b"", 404)
    assert client.ping() is True
    server.models = Respond(b"", 401)
    assert client.ping() is False


def test_get_models(server, client):
    listed = client.get_models()
    assert listed["success"] is True
    assert listed["model_ids"] == ["first"]
    assert listed["models"]["data"] == [{"id": "first"}]
    server.models = Respond.json({"data": [{"name": "x"}]})
    assert "unknown shape" in client.get_models()["error"]
    server.models = Respond.json({"error": "no"}, 403)
    assert client.get_models() == {"success": False, "error": "HTTP 403: no", "status_code": 403}


SECRET = "sk-do-not-tell-0123456789"


def test_api_key_is_sent_and_never_told(server, caplog, tmp_path, monkeypatch, connect):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.answers = [Respond.json({"error": {"message": f"key {SECRET} is wrong"}}, 401)]
    client = connect("127.0.0.1", server.port)
    result = client.generate("Hi")
    assert server.posts[0].headers["Authorization"] == f"Bearer {SECRET}"
    assert "key [api key] is wrong" in result["error"]
    assert SECRET not in caplog.text
    assert SECRET not in repr(client)
    assert SECRET not in str(result)


def test_api_key_argument_beats_config_beats_environment(server, tmp_path, monkeypatch, connect):
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    file = tmp_path / "server.yaml"
    file.write_text(f"base_url: {server.url}/v1/\napi_key: from-file\nmodel: m\n")
    server.answers = [Respond.json(chat())]
    connect(config_path=str(file)).generate("Hi")
    connect(config_path=str(file), api_key="from-argument").generate("Hi")
    sent = [request.headers["Authorization"] for request in server.posts]
    assert sent == ["Bearer from-file", "Bearer from-argument"]


def test_config_gives_defaults_and_arguments_beat_it(server, tmp_path, connect):
    file = tmp_path / "server.yaml"
    file.write_text(
        "host: 127.0.0.1\nport: 1\nmodel: named\nmax_tokens: 9\ntemperature: 0\n"
        "endpoint: completions\nretry_attempts: 1\ntimeout: 5\n"
    )
    server.answers = [Respond(b"busy", 503)]
    client = connect(config_path=str(file), port=server.port)
    assert client.generate("Hi")["attempts"] == 1
    assert server.posts[0].path == "/v1/completions"
    assert server.posts[0].payload == {
        "model": "named", "prompt": "Hi", "max_tokens": 9, "temperature": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("base_url", "root", "api"),
    [
        ("http://h:1", "http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1", "http://h:1/v1"),
        ("https://h/v1/", "https://h", "https://h/v1"),
        ("https://h/gateway", "https://h/gateway", "https://h/gateway/v1"),
        ("https://h/api/paas/v4", "https://h/api/paas", "https://h/api/paas/v4"),
        ("https://h/v1beta/openai/", "https://h", "https://h/v1beta/openai"),
        ("http://[::1]:8000", "http://[::1]:8000", "http://[::1]:8000/v1"),
        ("https://h/v1/chat/completions", "https://h", "https://h/v1"),
        ("https://h/v1/chat/completions/", "https://h", "https://h/v1"),
        ("http://h:1/v1/completions", "http://h:1", "http://h:1/v1"),
        ("http://h:1/v1/models", "http://h:1", "http://h:1/v1"),
        ("https://h/api/v4/chat/completions", "https://h/api", "https://h/api/v4"),
        ("https://h/chat/completions", "https://h", "https://h"),
        ("https://h/gate/chat/completions", "https://h/gate", "https://h/gate"),
        ("https://h/completions/v1", "https://h/completions", "https://h/completions/v1"),
    ],
)
def test_base_url(base_url, root, api):
    assert split_base_url(base_url) == (root, api)


@pytest.mark.parametrize(
    "base_url", ["ftp://h", "http://", "http://u:secret@h", "http://h?x=1", "http://::1:8000/v1"]
)
def test_bad_base_url(base_url):
    with pytest.raises(ValueError, match="base_url") as caught:
        VLLMPingClient(base_url=base_url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"port": 0}, "port"),
        ({"port": 65536}, "port"),
        ({"timeout": 0}, "timeout"),
        ({"retry_attempts": 0}, "retry_attempts"),
        ({"retry_delay": -1}, "retry_delay"),
        ({"endpoint": "embeddings"}, "endpoint"),
        ({"api_key": "line\nbreak"}, "api_key"),
        ({"host": "h", "base_url": "http://h"}, "base_url"),
        ({"host": "http://h"}, "host: .* a whole address to base_url"),
        ({"host": "h:8000"}, "host: .* the port goes to port"),
        ({"host": "::1:x"}, "host: "),
        ({"host": "[h]"}, "host: "),
        ({"host": ""}, "host: "),
        ({"config_path": "missing.yaml"}, "missing.yaml"),
    ],
)
def test_bad_constructor_arguments(arguments, named):
    with pytest.raises(ValueError, match=named) as caught:
        VLLMPingClient(**arguments)
    assert "break" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x \udcff"}, "prompt holds"),
        ({"prompt": "x", "model": "\udcff"}, "model holds"),
        ({"prompt": "x", "stop": ["y", "\udcff"]}, "stop holds"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "temperature": -0.1}, "temperature"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"prompt": "x", "top_p": 1.1}, "top_p"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "endpoint": "embeddings"}, "endpoint"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(server, client, arguments, named):
    with pytest.raises(ValueError, match=named):
        client.generate(**arguments)
    assert not server.requests


@pytest.mark.parametrize(
    ("path", "more", "asked"),
    [
        ("/v1/chat/completions", [], "/v1/chat/completions"),
        ("/v1/completions", [], "/v1/completions"),
        ("/v1/completions/", ["--endpoint", "chat"], "/v1/chat/completions"),
        ("/chat/completions", [], "/chat/completions"),
    ],
)
def test_a_base_url_that_is_the_whole_address(server, path, more, asked):
    server.answers = [Respond.json(chat())]
    command = ["--base-url", server.url + path, "--model", "m", "--prompt", "Hi"]
    assert ping_vllm.main([*command, *more]) == 0
    assert server.posts[0].path == asked


def test_a_proxy_is_not_used_for_this_machine(server, monkeypatch, connect):
    with closed_port() as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert connect("127.0.0.1", server.port).ping() is True


# --- command -------------------------------------------------------------------------------------


def test_command_prints_the_text(server, capsys):
    server.answers = [Respond.json(chat())]
    code = ping_vllm.main(["--port", str(server.port), "--prompt", "Hi", "--max-tokens", "7"])
    out, err = capsys.readouterr()
    assert code == 0
    assert out == "Hello there\n"
    assert "7 tokens (counted by usage)" in err


def test_command_prints_json_alone(server, capsys):
    server.answers = [Respond.events(delta(content="x"), delta("stop"))]
    code = ping_vllm.main(
        ["--base-url", server.url, "--prompt", "Hi", "--json", "--stream", "--verbose"]
    )
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert result["success"] is True
    assert result["generated_text"] == "x"
    assert result["server"] == server.url


def test_command_fails_with_exit_code_1(server, capsys):
    server.answers = [Respond(b"no", 400)]
    assert ping_vllm.main(["--port", str(server.port), "--prompt", "Hi"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: HTTP 400: no\n"
    assert ping_vllm.main(["--port", str(server.port), "--prompt", "Hi", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "HTTP 400: no"


def test_command_ping_only(server, capsys):
    arguments = ["--config", "configs/vllm.yaml", "--prompt", "Test", "--ping-only"]
    assert ping_vllm.main([*arguments, "--port", str(server.port)]) == 0
    assert capsys.readouterr().out == f"{server.url} is up\n"
    assert not server.posts
    with closed_port() as port:
        assert ping_vllm.main([*arguments, "--port", str(port)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "cannot connect" in err


def test_command_needs_a_prompt(capsys):
    assert ping_vllm.main([]) == 2
    assert "--prompt" in capsys.readouterr().err
