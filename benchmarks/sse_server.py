"""A bare server of streamed completions that logs when it wrote what, for the load client's tests.

    python benchmarks/sse_server.py --log FILE [--tokens 20] [--gap-ms 50] [--bundle 1]

Answers every POST with ``--tokens`` tokens, one event for every ``--bundle`` of them (the last may
hold fewer), ``--gap-ms`` apart: chunked server-sent events as vLLM writes them, each with the
``usage`` so far. The first line that it prints is its port. When it is told to end (SIGTERM) it
writes the log: a JSON object a line, with the ``prompt``, the ``kind`` ("asked", "text", "end"),
the ``tokens`` and ``ns``, ``time.perf_counter_ns()`` right before the bytes went to the socket,
which is the machine's monotonic clock, the same in all of its processes.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import signal
import time
from pathlib import Path
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Log = list[tuple[str, str, int, int]]


class Stream:
    """An answer on its way."""

    def __init__(self, prompt: str, transport: asyncio.Transport, sizes: list[int]) -> None:
        self.prompt, self.transport, self.sizes = prompt, transport, sizes
        self.sent = self.tokens = 0
        self.prompt_tokens = len(prompt.split())

    def write_next(self, log: Log) -> bool:
        """Writes an event, and behind the last one the end; whether there is another."""
        count = self.sizes[self.sent]
        self.sent += 1
        self.tokens += count
        last = self.sent == len(self.sizes)
        delta = {"content": "".join(f"{self.tokens - count + i} " for i in range(count))}
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": "length" if last else None,
        }
        data = _chunk(self._event([choice]))
        log.append((self.prompt, "text", count, time.perf_counter_ns()))
        self.transport.write(data)
        if last:
            log.append((self.prompt, "end", 0, time.perf_counter_ns()))
            self.transport.write(
                _chunk(self._event([])) + _chunk(b"data: [DONE]\n\n") + _chunk(b"")
            )
        return not last

    def _event(self, choices: list[Any]) -> bytes:
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }
        event = {
            "id": "chatcmpl-0123456789abcdef0123456789abcdef",
            "object": "chat.completion.chunk",
            "created": 1700000000,
            "model": "paced",
            "choices": choices,
            "usage": usage,
        }
        return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


class Pace:
    """All streams, and when each writes next."""

    def __init__(self, sizes: list[int], gap_ns: int) -> None:
        self.sizes, self.gap_ns = sizes, gap_ns
        self.log: Log = []
        self._due: list[tuple[int, int, Stream]] = []
        self._count = 0

    def begin(self, prompt: str, transport: asyncio.Transport) -> None:
        now = time.perf_counter_ns()
        self.log.append((prompt, "asked", 0, now))
        transport.write(HEAD)
        self._put(now + self.gap_ns, Stream(prompt, transport, self.sizes))

    async def run(self) -> None:
        while True:
            while self._due and self._due[0][0] <= time.perf_counter_ns():
                due, _, stream = heapq.heappop(self._due)
                if not stream.transport.is_closing() and stream.write_next(self.log):
                    self._put(due + self.gap_ns, stream)
            await asyncio.sleep(0.0005)

    def _put(self, due_ns: int, stream: Stream) -> None:
        self._count += 1
        heapq.heappush(self._due, (due_ns, self._count, stream))


class Connection(asyncio.Protocol):
    """Requests one after the other, as the load client sends them: with their length."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._rest += data
        head, end, body = self._rest.partition(b"\r\n\r\n")
        if not end:
            return
        lengths = [
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ]
        if len(body) < sum(lengths):
            return
        self._rest = body[sum(lengths) :]
        if not head.startswith(b"POST"):
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        asked = json.loads(body[: sum(lengths)])
        prompt = asked["messages"][-1]["content"] if "messages" in asked else asked["prompt"]
        self._pace.begin(prompt, self._transport)


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def serve(sizes: list[int], gap_ns: int, log: Path) -> None:
    """Until SIGTERM."""
    loop = asyncio.get_running_loop()
    pace = Pace(sizes, gap_ns)
    server = await loop.create_server(lambda: Connection(pace), "127.0.0.1", 0, backlog=4096)
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    running = asyncio.ensure_future(pace.run())
    print(server.sockets[0].getsockname()[1], flush=True)
    await ended.wait()
    running.cancel()
    with log.open("w") as file:
        for prompt, kind, tokens, ns in pace.log:
            entry = {"prompt": prompt, "kind": kind, "tokens": tokens, "ns": ns}
            file.write(json.dumps(entry) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--gap-ms", type=float, default=50)
    parser.add_argument("--bundle", type=int, default=1)
    args = parser.parse_args()
    whole, rest = divmod(args.tokens, args.bundle)
    sizes = [args.bundle] * whole + ([rest] if rest else [])
    asyncio.run(serve(sizes, int(args.gap_ms * 1e6), args.log))


if __name__ == "__main__":
    main()
