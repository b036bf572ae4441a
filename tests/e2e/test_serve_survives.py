"""Clients that leave, do not read, are very many or too early: the server goes on, or ends well."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from helpers import raw_http
from helpers.served import Served
from inferlab import SpeculativePipeline

pytestmark = pytest.mark.network

ROOT = Path(__file__).resolve().parents[2]
MANY = {"n": 64, "max_tokens": 900, "temperature": 1, "ignore_eos": True, "seed": 3}
"""A request that takes long: its tokens are more than are made while a test looks on."""
MANY_TOKENS = 64 * 900
CONNECTIONS = 600


@pytest.fixture(scope="module")
def server():
    """It begins with fewer files than it gets connections."""
    with Served("--no-cost-cache", before=few_files) as served:
        yield served


@pytest.fixture(scope="module")
def plain():
    return SpeculativePipeline(draft_mode="none")


def few_files():
    with contextlib.suppress(ImportError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("pipelined", [False, True])
def test_who_leaves_is_not_decoded_for(server, stream, pipelined):
    before = server.metric("vllm:generation_tokens_total")
    with server.connect() as connection:
        connection.sendall(raw_http.request({"prompt": "x", "stream": stream, **MANY}))
        if pipelined:
            connection.sendall(raw_http.request({"prompt": "x", **MANY}))
        server.wait_until_running(8)
        assert server.metric("vllm:kv_cache_usage_perc") > 0
    server.wait_until_idle()
    assert server.metric("vllm:generation_tokens_total") - before < MANY_TOKENS / 2


def test_who_leaves_while_waiting_is_forgotten(server):
    before = server.metric("vllm:generation_tokens_total")
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(server.connect())
            connection.sendall(raw_http.request({"prompt": "x", **MANY}))
        server.wait_until_running(8)
    server.wait_until_idle()
    assert server.metric("vllm:generation_tokens_total") - before < 2 * MANY_TOKENS


def test_who_does_not_read_keeps_nobody_waiting(server, plain):
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(server.connect())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = {"prompt": "x", **MANY, "n": 8, "stream": True}
            connection.sendall(raw_http.request(body))
        server.wait_until_running()
        expected = plain.generate("class Stack:", max_tokens=16)["text"]
        for _ in range(4):
            assert server.complete().json()["choices"][0]["text"] == expected
        server.wait_until_idle(120)  # they are decoded to their ends, which wait to be read
        assert server.complete().status_code == 200
    server.wait_until_idle()


def test_a_stream_that_is_read_late_is_whole(server):
    body = {"prompt": "x", "max_tokens": 300, "temperature": 1, "seed": 5, "ignore_eos": True}
    whole = server.complete(**body).json()["choices"][0]["text"]
    with server.connect() as connection:
        connection.sendall(raw_http.request({**body, "stream": True}, "Connection: close"))
        server.wait_until_idle()
        status, data = raw_http.answer(connection)
    events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    assert (status, events[-1]) == (200, "[DONE]")
    texts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert "".join(texts) == whole


def test_very_many_at_a_time(server, plain):
    """All connections are open before the first request is sent."""
    host, port = server.url.removeprefix("http://").split(":")
    expected = plain.generate("class Stack:", max_tokens=3)["text"]
    body = {"prompt": "class Stack:", "max_tokens": 3, "temperature": 0}
    asked = raw_http.request(body, "Connection: close")

    async def ask(reader, writer):
        writer.write(asked)
        answer = await reader.read()
        writer.close()
        return answer

    async def ask_all():
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(CONNECTIONS)]
        return await asyncio.gather(*(ask(*pair) for pair in opened))

    answers = asyncio.run(ask_all())
    assert len(answers) == CONNECTIONS
    for answer in answers:
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), answer[:300]
        assert json.loads(content)["choices"][0]["text"] == expected
    server.wait_until_idle()
    assert "Traceback" not in server.log.read_text()


def test_a_full_queue_refuses_at_once(tmp_path):
    """Eight ask at a time, one runs and two wait."""
    config = tmp_path / "one.yaml"
    config.write_text("max_batch: 1\n")
    with Served("--config", str(config), "--max-waiting", "2", "--draft-mode", "none") as served:

        def ask(stream):
            return served.complete(max_tokens=500, ignore_eos=True, stream=stream)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, [False, True] * 20))
        assert {answer.status_code for answer in answers} == {200, 429}
        for refused in (answer for answer in answers if answer.status_code == 429):
            error = error_of(refused, 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert refused.headers["retry-after"] == "1"
        served.wait_until_idle()
        assert error_of(served.complete(n=4), 400)["message"].startswith("4 choices")
        assert served.complete(n=3).status_code == 200


def test_few_pages_let_requests_wait_and_none_fail(tmp_path, plain):
    config = tmp_path / "few.yaml"
    config.write_text("num_pages: 12\npage_size: 16\n")
    with Served("--config", str(config), "--no-cost-cache") as served:
        bodies = [
            {"prompt": f"def f{i}(", "max_tokens": 60, "seed": i, "temperature": 0.8, "n": 2}
            for i in range(12)
        ]
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda body: served.complete(**body), bodies))
        for body, answer in zip(bodies, answers, strict=True):
            for choice in answer.json()["choices"]:
                expected = plain.generate(
                    body["prompt"],
                    max_tokens=60,
                    temperature=0.8,
                    seed=body["seed"] + choice["index"],
                )
                assert choice["text"] == expected["text"]
        served.wait_until_idle()
        refused = error_of(served.complete(max_tokens=190), 400)
        assert refused["code"] == "context_length_exceeded"
        (model,) = served.http.get("/v1/models").json()["data"]
        assert model["max_model_len"] < 12 * 16


def load(served, pool, count=6, **body):
    """Requests that run for a while, in other threads."""
    given = {**MANY, "n": 4, **body}
    futures = [pool.submit(served.complete, **given) for _ in range(count)]
    served.wait_until_running(4)
    return futures


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_once_all_is_answered(number):
    with Served("--no-cost-cache") as served, concurrent.futures.ThreadPoolExecutor(8) as pool:
        with served.connect() as idle:
            running = load(served, pool, max_tokens=300)
            served.process.send_signal(number)
            for future in running:
                choices = future.result().json()["choices"]
                assert [choice["finish_reason"] for choice in choices] == ["length"] * 4
            assert idle.recv(1) == b""
        assert served.process.wait(60) == 0
        assert "Traceback" not in served.log.read_text()


def test_what_is_not_done_in_time_is_told_so():
    flags = ("--no-cost-cache", "--drain-seconds", "0.2")
    with Served(*flags) as served, concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = load(served, pool, count=4, n=32)
        stream = served.connect()
        stream.sendall(raw_http.request({"prompt": "x", "stream": True, **MANY}))
        served.wait_until_running(16)
        served.process.send_signal(signal.SIGTERM)
        for future in running:
            assert "shutting down" in error_of(future.result(), 503)["message"]
        assert b"shutting down" in raw_http.all_of(stream)
        assert served.process.wait(60) == 0
        assert "Traceback" not in served.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(number):
    """It dies of it, as a process does that has no handler."""
    with Served("--no-cost-cache") as served, served.connect() as connection:
        connection.sendall(raw_http.request({"prompt": "x", **MANY, "n": 128}))
        served.wait_until_running(4)
        served.process.send_signal(number)
        with contextlib.suppress(httpx.HTTPError):
            while served.http.get("/ready").status_code == 200:
                pass
        served.process.send_signal(number)
        assert served.process.wait(60) == -number
        assert "Traceback" not in served.log.read_text()


def test_soak():
    """A short run; the long one is `python benchmarks/soak.py`."""
    words = [sys.executable, ROOT / "benchmarks" / "soak.py", "--requests", "300"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
