"""What is refused before the application hears of a request, and how long clients may take."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import pytest
import uvicorn

from inferlab.server import connection, gate
from inferlab.server.gate import Gate

LIMIT = 100


async def echo(scope, receive, send):
    """Answers with the body, which comes whole, and waits for the client to leave."""
    message = await receive()
    assert not message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"], "more_body": False})
    assert (await receive())["type"] == "http.disconnect"


def part(body, more):
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


async def never():
    await asyncio.Event().wait()


async def ask(made, *messages, headers=()):
    """Status and body that a gate answers; messages that can be called are waited for."""
    left, sent = list(messages), []

    async def receive():
        message = left.pop(0)
        return await message() if callable(message) else message

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/v1/completions", "headers": list(headers)}
    await made(scope, receive, send)
    status = sent[0]["status"] if sent else None
    return status, b"".join(message.get("body", b"") for message in sent)


def test_a_body_comes_whole_however_it_was_cut():
    made = Gate(echo, (), LIMIT)
    parts = [part(b"a", True), part(b"", True), part(b"bc", False), GONE]
    assert asyncio.run(ask(made, *parts)) == (200, b"abc")


def test_who_leaves_in_the_middle_of_a_body_gets_nothing():
    made = Gate(echo, (), LIMIT)
    assert asyncio.run(ask(made, part(b"a", True), GONE)) == (None, b"")


@pytest.mark.parametrize("count", [LIMIT, LIMIT + 1])
def test_bodies_are_counted_as_they_come(count):
    parts = [part(b"x", True)] * (count - 1) + [part(b"x", False), GONE]
    status, _ = asyncio.run(ask(Gate(echo, (), LIMIT), *parts))
    assert status == (200 if count == LIMIT else 413)


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.01)
    monkeypatch.setattr(gate, "DISCARD_SECONDS", 0.01)
    status, body = asyncio.run(ask(Gate(echo, (), LIMIT), part(b"a", True), never, never))
    assert status == 408
    assert "took longer" in json.loads(body)["error"]["message"]


def test_all_bodies_together_are_bounded(monkeypatch):
    monkeypatch.setattr(gate, "HELD_BODIES", 3)
    monkeypatch.setattr(gate, "DISCARD_SECONDS", 0.01)

    async def run():
        made = Gate(echo, (), LIMIT)
        go_on = asyncio.Event()

        async def rest():
            await go_on.wait()
            return part(b"", False)

        held = [
            asyncio.create_task(ask(made, part(b"x" * LIMIT, True), rest, GONE)) for _ in range(3)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        refused = await ask(made, part(b"x", False), GONE)
        go_on.set()
        answers = await asyncio.gather(*held)
        return refused, answers, await ask(made, part(b"x", False), GONE)

    (status, body), answers, after = asyncio.run(run())
    assert status == 503
    assert "at once" in json.loads(body)["error"]["message"]
    assert [status for status, _ in answers] == [200] * 3
    assert after == (200, b"x")


def test_what_is_wrong_further_in_is_not_the_gates():
    async def broken(scope, receive, send):
        raise RuntimeError("broken")

    made = Gate(broken, (), LIMIT)
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(ask(made, part(b"x", False)))
    assert made._held == 0


@pytest.fixture
def address(monkeypatch):
    """Of a server whose clients have a moment for their heads."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    config = uvicorn.Config(
        echo, port=0, http=connection.Connection, ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()
        server.should_exit = True
        thread.join(60)


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nx: y", b"\r\n"])
def test_a_head_that_does_not_come_is_given_up(address, begun):
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(begun)
        assert client.recv(100) == b""


def test_a_second_head_has_as_long_and_an_answer_longer(address):
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n")
        threading.Event().wait(0.5)
        client.sendall(b"ab")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET / HTTP/1.1\r\nx")
        assert client.recv(100) == b""
