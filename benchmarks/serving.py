"""`inferlab serve` beside `transformers serve`, over HTTP, on the same model and prompts.

    python benchmarks/serving.py [--model DIR] [--concurrency 1,8,32] [--requests 64] [--rounds 3]
        [--max-tokens 64] [--servers plain,inferlab,transformers,transformers-cb] [--flags "..."]
        [--prompts FILE.json]

Closed loop: so many connections, each of which asks anew when its answer has ended. All servers run
at the same time and are measured in turns, each round the same requests in another order; streams
at temperature 0, so `inferlab` answers as `plain` does, which is itself without drafts. Medians
over rounds of: time to the first chunk that has text (its 99th percentile beside it), milliseconds
per token behind that (TPOT: from the first such chunk to the last, over the tokens of ``usage`` but
one), tokens per second of all. ``bare`` is the same engine without HTTP, one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from inferlab import SpeculativePipeline
from inferlab.benchmarks.environment import describe_environment
from inferlab.models import resolve_model_path
from inferlab.training.material.corpus import heldout_prompts

START_S = 180
OURS = {"inferlab": [], "plain": ["--draft-mode", "none"]}
THEIRS = {"transformers": [], "transformers-cb": ["--continuous-batching"]}


class Timed(NamedTuple):
    first_ms: float
    tpot_ms: float
    tokens: int


class Server(NamedTuple):
    port: int
    model: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="inferlab/tiny")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--requests", type=int, default=64, help="of each round, per server")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--servers", default="plain,inferlab,transformers,transformers-cb")
    parser.add_argument("--flags", default="", help="more flags of inferlab serve")
    parser.add_argument("--prompts", help="a JSON list of texts (held-out ones)")
    parser.add_argument("--bare", action="store_true", help="the engine without HTTP as well")
    args = parser.parse_args()
    prompts = json.loads(Path(args.prompts).read_text()) if args.prompts else heldout_prompts(40)
    names = args.servers.split(",")
    environment = describe_environment()
    print(json.dumps(environment), "\n", flush=True)
    print("| server | concurrency | first text, ms | p99 | TPOT, ms | tokens/s |")
    print("|---|---|---|---|---|---|", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {name: start(name, args, folder, stack) for name in names}
        for server in servers.values():
            asyncio.run(load(server, prompts[:4], args.max_tokens, 2))
        bare = SpeculativePipeline(base_model=args.model) if args.bare else None
        for concurrency in map(int, args.concurrency.split(",")):
            rows: dict[str, list[tuple[list[Timed], float]]] = defaultdict(list)
            for number in range(args.rounds):
                shuffled = random.Random(number).sample(prompts, len(prompts))
                asked = [shuffled[i % len(shuffled)] for i in range(args.requests)]
                if bare is not None and concurrency == 1:
                    rows["bare"].append(alone(bare, asked, args.max_tokens))
                for name, server in servers.items():
                    few = name.startswith("transformers") and concurrency == 1
                    some = asked[: max(len(asked) // 4, 4)] if few else asked
                    rows[name].append(asyncio.run(load(server, some, args.max_tokens, concurrency)))
            for name, rounds in rows.items():
                print(row_of(name, concurrency, rounds), flush=True)


def row_of(name: str, concurrency: int, rounds: list[tuple[list[Timed], float]]) -> str:
    def mid(of: Any) -> float:
        return median(of(timed, seconds) for timed, seconds in rounds)

    first = mid(lambda timed, _: median(t.first_ms for t in timed))
    worst = mid(lambda timed, _: quantiles([t.first_ms for t in timed], n=100)[-1])
    tpot = mid(lambda timed, _: median(t.tpot_ms for t in timed))
    rate = mid(lambda timed, seconds: sum(t.tokens for t in timed) / seconds)
    return f"| {name} | {concurrency} | {first:.2f} | {worst:.1f} | {tpot:.3f} | {rate:.0f} |"


def alone(
    pipeline: SpeculativePipeline, prompts: list[str], most: int
) -> tuple[list[Timed], float]:
    """What `load` measures, without a server."""
    timed = []
    begun = time.perf_counter()
    for prompt in prompts:
        result = pipeline.generate(prompt, max_tokens=most, on_token=lambda piece: None)
        spread = result["latency_ms"] - result["first_token_ms"]
        tokens = result["num_tokens"]
        timed.append(Timed(result["first_token_ms"], spread / max(tokens - 1, 1), tokens))
    return timed, time.perf_counter() - begun


async def load(
    server: Server, prompts: list[str], most: int, concurrency: int
) -> tuple[list[Timed], float]:
    """Asks for all texts, so many at a time; returns the times of each, and seconds in all."""
    left = list(prompts)
    timed: list[Timed] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while left:
            timed.append(await ask(reader, writer, server, left.pop(), most))
        writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return timed, time.perf_counter() - begun


async def ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    server: Server,
    prompt: str,
    most: int,
) -> Timed:
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": most,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    begun = time.perf_counter()
    writer.write(head.encode() + data)
    status = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1]
    first = last = None
    tokens = 0
    while size := int(await reader.readline(), 16):
        chunk = await reader.readexactly(size)
        await reader.readexactly(2)
        assert status == b"200", chunk
        now = time.perf_counter()
        for event in chunk.split(b"\n\n"):
            if not event.startswith(b"data: {"):
                continue
            content = json.loads(event[6:])
            if content.get("usage"):
                tokens = content["usage"]["completion_tokens"]
            if any(choice.get("text") for choice in content.get("choices", ())):
                first, last = first or now, now
    await reader.readexactly(2)
    if first is None or last is None or not tokens:
        raise RuntimeError("an answer without text or usage")
    return Timed((first - begun) * 1e3, (last - first) * 1e3 / max(tokens - 1, 1), tokens)


def start(name: str, args: argparse.Namespace, folder: Path, stack: ExitStack) -> Server:
    """A server in a process of its own, until the stack is closed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = args.model
    environment = dict(os.environ)
    if name in OURS:
        words = ["inferlab", "serve", "--base-model", model, *OURS[name], *shlex.split(args.flags)]
    else:
        model = "local/model"
        hub = folder / "hub"
        put_into_hub_cache(Path(resolve_model_path(args.model)), hub, model)
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
        words = ["transformers.cli.transformers", "serve", "--device", "cpu", *THEIRS[name]]
    log = folder / f"{name}.log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", *words, "--port", str(port)],
            env=environment,
            stdout=written,
            stderr=written,
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    end = time.monotonic() + START_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return Server(port, model)
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"{name} did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)


def put_into_hub_cache(model: Path, hub: Path, name: str) -> None:
    """A model's directory as if it had been downloaded; greedy as the requests ask for."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    if snapshot.exists():
        return
    shutil.copytree(model, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    if not re.search("chat_template", " ".join(os.listdir(snapshot))):
        (snapshot / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


if __name__ == "__main__":
    main()
