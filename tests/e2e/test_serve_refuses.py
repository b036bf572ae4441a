"""What strangers send that cannot be answered: the server says so, and goes on."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import socket
import sys
from pathlib import Path

import httpx
import pytest

from helpers import raw_http
from helpers.served import Served, chat_model

pytestmark = pytest.mark.network

CHAT = "/v1/chat/completions"
PATHS = (raw_http.COMPLETIONS, CHAT)
JSON = {"content-type": "application/json"}
MAX_BODY = 4 * 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = chat_model(tmp_path_factory.mktemp("chat"))
    with Served("--base-model", str(folder), "--served-model-name", "tiny") as served:
        yield served


@pytest.fixture(autouse=True)
def still_serves(server):
    """Whatever a test has sent, the next one is answered and nothing is left behind."""
    yield
    assert server.complete(max_tokens=2).status_code == 200
    server.wait_until_idle()
    assert "Traceback" not in server.log.read_text()


def error_of(response: httpx.Response, status: int) -> dict:
    """The error object of an answer, which must be one in OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(response.content) < 2000
    return error


def message(content, **more):
    return {"messages": [{"role": "user", "content": content}], **more}


BODIES = {
    "empty": b"",
    "broken": b'{"prompt": "x"',
    "two objects": b'{"prompt": "x"}{}',
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a text": b'"prompt"',
    "deep lists": b"[" * 500_000,
    "deep objects": b'{"metadata":' * 200_000,
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "half a pair": b'{"prompt": "\\ud800"}',
    "half a pair as a name": b'{"prompt": "x", "\\udfff": 1}',
    "a long number": b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    "NUL": b"\0",
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_what_is_no_json_object(server, path, body):
    error = error_of(server.http.post(path, content=body, headers=JSON), 400)
    assert error["code"] == "invalid_json"
    assert error["type"] == "invalid_request_error"


WRONG = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": ["x", ""]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": [1, "x"]}, "prompt.1"),
    ({"prompt": [1.5]}, "prompt.0"),
    ({"prompt": [True]}, "prompt.0"),
    ({"prompt": [4096]}, "prompt"),
    ({"prompt": [2**31]}, "prompt.0"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1e12}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": float("nan")}, "top_p"),
    ({"top_p": 1e-300}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": float("nan")}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"repetition_penalty": 1e300}, "repetition_penalty"),
    ({"presence_penalty": float("nan")}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"n": 10**4000}, "n"),
    ({"prompt": ["x"] * 1000}, "n"),
    ({"best_of": 10**4000}, None),
    ({"seed": 2**64}, "seed"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"1": float("nan")}}, "logit_bias.1"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x", ""]}, "stop.1"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 100_000}, "stop"),
    ({"stop_token_ids": [9999]}, "stop_token_ids"),
    ({"stream_options": {"include_usage": True}}, None),
    ({"stream": True, "stream_options": {"loud": True}}, "stream_options.loud"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "max_tokens": 10**6}, "max_tokens"),
    ({"stream": True, "stop_token_ids": [9999]}, "stop_token_ids"),
    ({"nonsense": 1}, "nonsense"),
    ({"k" * 100_000: 1}, "k" * 100 + "..."),
    ({"logprobs": 21}, "logprobs"),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize(("given", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_fields_that_are_wrong_are_named(server, given, param):
    body = json.dumps({"prompt": "x", **given})
    error = error_of(server.http.post(raw_http.COMPLETIONS, content=body, headers=JSON), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (message([{"type": "image_url", "text": "x"}]), "messages.0.content.0.type"),
        (message("x", tools=[{}]), "tools"),
        (message("x", max_completion_tokens=0), "max_completion_tokens"),
        (message("x", max_completion_tokens=5000), "max_tokens"),
        (message("x" * 9000), "prompt"),
        (message("x", modalities=["audio"]), "modalities.0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fields_of_a_chat_too(server, body, param):
    assert error_of(server.http.post(CHAT, json=body), 400)["param"] == param


@pytest.mark.parametrize("entry", ["-1", "{}", "[-1]", '""', "1.5"])
@pytest.mark.parametrize("field", ["prompt", "messages", "unknown"])
def test_millions_of_mistakes_are_one_error(server, field, entry):
    """All that is wrong with such a body would take seconds and gigabytes to say."""
    before = peak_memory(server)
    count = 3_000_000 // (len(entry) + 1)
    if field == "unknown":
        body = "{" + ",".join(f'"{i}":{entry}' for i in range(count // 3)) + "}"
    else:
        body = f'{{"{field}":[' + ",".join([entry] * count) + "]}"
    path = CHAT if field == "messages" else raw_http.COMPLETIONS
    error_of(server.http.post(path, content=body, headers=JSON), 400)
    assert peak_memory(server) - before < 512 * 2**20


def test_more_than_the_context(server):
    for body in ({"max_tokens": 2000}, {"prompt": "x " * 3000}, {"prompt": [5] * 1024}):
        error = error_of(server.complete(**body), 400)
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length is 1024 tokens" in error["message"]
    assert server.complete(prompt=[5] * 1000, max_tokens=24).status_code == 200


def test_harmless_oddities_are_answered(server):
    for body in (
        {"prompt": "a\0b"},
        {"prompt": [0, 1, 4095]},
        {"temperature": 5e-324},
        {"temperature": 1e30, "top_p": 1e-30, "top_k": 2**31 - 1},
        {"repetition_penalty": 1e30},
        {"logit_bias": {str(i): -100 for i in range(1024)}},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1, "n": 3},
        {"user": {"deep": [[[]]]}, "metadata": [1] * 10_000},
        {"stop": ["y" * 1024] * 16, "stream": True},
        {"stream": True, "n": 20, "temperature": 1, "prompt": ["a", "b"]},
        {"best_of": 1, "suffix": None, "max_tokens": 1},
    ):
        assert server.complete(**body).status_code == 200, str(body)[:80]
    twice = b'{"prompt": "x", "max_tokens": 9, "max_tokens": 2}'
    answer = server.http.post(raw_http.COMPLETIONS, content=twice, headers=JSON).json()
    assert answer["usage"]["completion_tokens"] == 2  # as in all of Python: the last counts


def test_texts_of_broken_characters_are_the_same_in_streams(server):
    for seed in range(12):
        body = {"max_tokens": 60, "temperature": 3, "seed": seed, "prompt": "é日本"}
        whole = server.complete(**body).json()["choices"][0]["text"]
        lines = server.complete(**body, stream=True).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == whole


def test_special_tokens_in_a_message_are_text(server):
    def prompt_tokens(content):
        given = message(content, max_tokens=1)
        return server.http.post(CHAT, json=given).json()["usage"]["prompt_tokens"]

    assert prompt_tokens("<|endoftext|>") > prompt_tokens("") + 1


@pytest.mark.parametrize("prompt", ["a" * 2**20, " " * 2**20], ids=["word", "blanks"])
def test_long_texts_do_not_keep_others_waiting(server, prompt):
    """Three of them in one body take seconds; a short request that comes behind it is answered
    first."""
    done = []

    def ask(name, **body):
        answer = server.complete(**body)
        done.append(name)
        return answer

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, "long", prompt=[prompt] * 3)
        with server.connect() as probe:  # its body is there once the server has read it
            probe.sendall(raw_http.request({"prompt": "x", "max_tokens": 1}))
            assert raw_http.answer(probe)[0] == 200
        ask("short", max_tokens=2)
        assert error_of(long.result(), 400)["code"] == "context_length_exceeded"
    assert done == ["short", "long"]


def peak_memory(server) -> int:
    """Of the server so far, in bytes; 0 where the system does not say."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        return 0
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_bodies_over_the_limit_are_refused_before_they_come(server):
    with server.connect() as connection:
        connection.sendall(raw_http.head(f"Content-Length: {10**12}"))
        status, body = raw_http.answer(connection)
        assert status == 413
        assert json.loads(body)["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("path", [*PATHS, "/v1/nothing"])
def test_bodies_that_do_not_say_how_long_they_are(server, path):
    """The client, which sends on until it is through, receives the answer."""
    before = peak_memory(server)
    chunk = b"%x\r\n" % 2**16 + b" " * 2**16 + b"\r\n"
    with server.connect() as connection:
        connection.sendall(raw_http.head("Transfer-Encoding: chunked", path=path))
        for _ in range(64 * 16):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n")
        status, body = raw_http.answer(connection)
        assert status == 413
        assert json.loads(body)["error"]["code"] == "body_too_large"
        assert connection.recv(1) == b""
    assert peak_memory(server) - before < 8 * MAX_BODY


def test_an_httpx_client_receives_it_too(server):
    for content in (b" " * (MAX_BODY + 1), (b" " * 2**16 for _ in range(80))):
        answer = server.http.post(raw_http.COMPLETIONS, content=content, headers=JSON)
        assert error_of(answer, 413)["code"] == "body_too_large"
    fits = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    fits += b" " * (MAX_BODY - len(fits))
    answer = server.http.post(raw_http.COMPLETIONS, content=fits, headers=JSON)
    assert answer.status_code == 200


def test_other_types_and_encodings(server):
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        headers = {"content-type": kind}
        error_of(server.http.post(raw_http.COMPLETIONS, content=body, headers=headers), 415)
    headers = {**JSON, "content-encoding": "gzip"}
    packed = gzip.compress(body)
    error_of(server.http.post(raw_http.COMPLETIONS, content=packed, headers=headers), 415)
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    answer = server.http.post(raw_http.COMPLETIONS, content=body, headers=headers)
    assert answer.status_code == 200


def test_paths_methods_and_models_that_are_not_there(server):
    http = server.http
    assert error_of(http.get("/v1/nothing"), 404)["type"] == "not_found_error"
    error_of(http.post("/v1/nothing", json={}), 404)
    error_of(http.get("/%00%ff/../etc/passwd"), 404)
    for path in PATHS:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
            refused = http.request(method, path)
            error_of(refused, 405)
            assert refused.headers["allow"] == "POST"
        assert http.head(path).status_code == 405
    error_of(http.post("/v1/models", json={}), 405)
    for name in ("gpt-4", "x" * 1_000_000):
        error = error_of(server.complete(model=name), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    error_of(http.get("/v1/models/gpt-4"), 404)


def test_a_connection_goes_on_behind_errors(server):
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        for _ in range(3):
            assert http.post(raw_http.COMPLETIONS, content=b"{", headers=JSON).status_code == 400
            assert http.get("/nothing").status_code == 404
            good = http.post(raw_http.COMPLETIONS, json={"prompt": "x", "max_tokens": 1})
            assert good.status_code == 200
            (connection,) = http._transport._pool.connections
        assert "Request Count: 9" in repr(connection)


HEADS = {
    "many headers": b"".join(b"x-%d: y\r\n" % i for i in range(200_000)),
    "a long header": b"x: " + b"y" * 3_000_000,
    "a long name": b"x" * 3_000_000,
    "a long folded header": b"x: y\r\n" + b" y\r\n" * 500_000,
}


def takes(connection, data, times=1):
    """Whether all of what is sent is taken; else the server has hung up."""
    try:
        for _ in range(times):
            connection.sendall(data)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("flood", HEADS.values(), ids=HEADS)
def test_floods_of_headers(server, flood):
    with server.connect() as connection:
        takes(connection, b"GET /health HTTP/1.1\r\n" + flood)
        assert raw_http.all_of(connection)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")


def test_floods_of_paths_trailers_and_empty_chunks(server):
    before = peak_memory(server)
    body = raw_http.head("Transfer-Encoding: chunked")
    for start, flood in (
        (b"GET /", b"y" * 2**16),
        (body + b"1\r\n{\r\n0\r\n", b"x: y\r\n" * 2**13),
        (body + b"1;", b"y" * 2**16),
    ):
        with server.connect() as connection:
            connection.sendall(start)
            assert not takes(connection, flood, 2000)
    assert peak_memory(server) - before < 32 * 2**20


def test_what_is_no_http(server):
    for data in (b"\x16\x03\x01\x02\0", b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(data)
            came = raw_http.all_of(connection)
            assert came.startswith(b"HTTP/1.1 400")
            assert json.loads(came.partition(b"\r\n\r\n")[2])["error"]["message"]
    smuggled = raw_http.head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(smuggled + b"GET /health HTTP/1.1\r\n\r\n")
        assert raw_http.all_of(connection).count(b"HTTP/1.1 ") == 1


def test_pipelined_requests_are_answered_in_order(server):
    few = b"".join(raw_http.request({"prompt": "x", "max_tokens": n}) for n in (1, 2, 3))
    last = raw_http.request({"prompt": "x", "max_tokens": 4}, "Connection: close")
    with server.connect() as connection:
        connection.sendall(few + last)
        came = raw_http.all_of(connection).decode()
    counts = [part.split(",")[0] for part in came.split('"completion_tokens":')[1:]]
    assert counts == ["1", "2", "3", "4"]


def test_a_flood_of_pipelined_requests_is_cut_off(server):
    before = peak_memory(server)
    slow = raw_http.request({"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "n": 8})
    with server.connect() as connection:
        connection.sendall(slow)
        takes(connection, b"GET /metrics HTTP/1.1\r\n\r\n" * 1000, 200)
        assert raw_http.all_of(connection).count(b"HTTP/1.1 200") < 100
    assert peak_memory(server) - before < 64 * 2**20


def test_clients_that_ask_before_they_send(server):
    """`Expect: 100-continue`: asked to go on where the body is wanted, and refused where not."""
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    with server.connect() as connection:
        connection.sendall(raw_http.head(f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert raw_http.answer(connection)[0] == 200
    with server.connect() as connection:
        connection.sendall(raw_http.head(f"Content-Length: {10**9}", "Expect: 100-continue"))
        came = raw_http.all_of(connection)
        assert came.startswith(b"HTTP/1.1 413")
        assert b" 100 " not in came


def test_offers_of_other_protocols_are_passed_over(server):
    for protocol in ("websocket", "h2c"):
        upgrade = ("Connection: Upgrade", f"Upgrade: {protocol}")
        with server.connect() as connection:
            for _ in range(2):
                connection.sendall(raw_http.request({"prompt": "x", "max_tokens": 1}, *upgrade))
                assert raw_http.answer(connection)[0] == 200
    with server.connect() as connection:
        websocket = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
        head = "\r\n".join(("GET /v1/completions HTTP/1.1", "Host: here", *websocket))
        connection.sendall(head.encode() + b"\r\n\r\n")
        assert raw_http.answer(connection)[0] == 405


def test_clients_that_leave_before_they_are_through(server):
    for data in (
        b"",
        b"POST /v1/comp",
        raw_http.head("Content-Length: 100"),
        raw_http.head("Content-Length: 100") + b'{"prompt"',
        raw_http.head("Transfer-Encoding: chunked") + b"5\r\nab",
    ):
        connection = server.connect()
        connection.sendall(data)
        linger = b"\1\0\0\0\0\0\0\0" if sys.byteorder == "little" else b"\0\0\0\1\0\0\0\0"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()  # a reset


def test_keys(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")
    with Served("--impl", "fake", "--api-key-file", str(keys)) as served:
        paths = ("/v1/models", "/metrics", "/openapi.json", "/docs", "/nothing")
        for given in (None, "Bearer", "Bearer wrong", "Basic first-key", "first-key"):
            headers = {} if given is None else {"authorization": given}
            for path in paths:
                refused = served.http.get(path, headers=headers)
                assert error_of(refused, 401)["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
            refused = served.http.post(raw_http.COMPLETIONS, content=b"{", headers=headers)
            error_of(refused, 401)
        strange = served.http.get("/v1/models", headers={"authorization": b"Bearer \xff\xfe"})
        error_of(strange, 401)
        for path in ("/health", "/ready"):
            assert served.http.get(path).status_code == 200
        for key in ("first-key", "second-key"):
            headers = {"authorization": f"Bearer {key}"}
            assert served.http.get("/v1/models", headers=headers).status_code == 200
