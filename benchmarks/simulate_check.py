"""`inferlab simulate` beside real servers: predicted and measured throughput, TTFT and TPOT.

    OMP_NUM_THREADS=1 python benchmarks/simulate_check.py [--model DIR] [--draft-mode none --K 3]
        [--requests 96] [--rounds 3] [--max-tokens 64] [--prompts FILE.json]

Two processes of `inferlab serve`, a thread each, and this one, which asks them and routes (round
robin). What steps cost is measured first, what they accept is recorded from the same prompts. What
a server adds (per step, per sequence of a step, per request, and latency), and how fast the machine
was beside when costs were measured, is fitted to closed loops of one and of eight clients on one
replica, the loads marked `fit`; the others are predicted with that. Requests, prompts, lengths and
arrival times are the same in both; prefixes are not shared. All loads take turns in each round, and
costs are measured again; of each number the best round counts: other work on a machine makes it
slow for longer than a run takes. Two replicas and their client are three processes: on two cores
they wait for each other, which is not in the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from inferlab import SpeculativePipeline
from inferlab.benchmarks.environment import describe_environment
from inferlab.simulation.acceptance import Acceptance, Chances, Recorded
from inferlab.simulation.clock import simulate
from inferlab.simulation.load import Arrivals, Load, Requests, Text
from inferlab.simulation.prices import Overhead, Prices
from inferlab.simulation.setting import Setting
from inferlab.simulation.summary import summarize
from inferlab.specdec.costs import CostModel
from inferlab.specdec.recorded import read_recording
from inferlab.training.material.corpus import heldout_prompts
from server_process import start_server

SHARES_OF_CAPACITY = (0.4, 0.7)
FITTED = (1, 8)
"""Clients of the closed loops that the overhead is fitted to."""


class Case(NamedTuple):
    """A load on so many replicas; ``fit``: the overhead is fitted to it."""

    replicas: int
    arrivals: Arrivals
    fit: bool = False

    def __str__(self) -> str:
        a = self.arrivals
        asked = f"{a.clients} clients" if a.rate is None else f"{a.rate:.0f}/s {a.kind}"
        return f"{self.replicas} x, {asked}"


class Server(NamedTuple):
    port: int
    model: str


class Timed(NamedTuple):
    """An answer."""

    first_ms: float
    tpot_ms: float
    tokens: int


class Found(NamedTuple):
    """Of a run: tokens per second, and medians in ms."""

    rate: float
    ttft: float
    tpot: float


class World(NamedTuple):
    """What is simulated, but for the load."""

    costs: CostModel
    acceptance: Acceptance
    texts: tuple[Text, ...]
    setting: Setting
    requests: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="inferlab/tiny")
    parser.add_argument("--draft-mode", default="none")
    parser.add_argument("--K", type=int, default=3, help="of a draft mode, in every step")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompts", help="a JSON list of texts (held-out ones)")
    parser.add_argument("--flags", default="", help="more flags of inferlab serve")
    args = parser.parse_args()
    if torch.get_num_threads() > 1:
        raise SystemExit("run it with OMP_NUM_THREADS=1, as the servers are")
    prompts = json.loads(Path(args.prompts).read_text()) if args.prompts else heldout_prompts(40)
    print(json.dumps(describe_environment()), f"\nload {os.getloadavg()}", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        world, measure = known(args, prompts, folder)
        servers = [start(number, args, folder, stack) for number in range(2)]
        for server in servers:
            asyncio.run(ask_all([server], Arrivals(clients=4), prompts, args.max_tokens, ()))
        measured: dict[Case, list[Found]] = {}
        cases = [Case(1, Arrivals(clients=n), n in FITTED) for n in (1, 2, 4, 8, 16)]
        cases += [Case(2, Arrivals(clients=n)) for n in (2, 8, 16)]
        for number in range(args.rounds):
            for case in cases:
                found = really(case, world, servers, prompts, args.max_tokens)
                measured.setdefault(case, []).append(found)
            world = world._replace(costs=min(world.costs, measure(), key=usual_ms))
            if number == 0:  # which says how much there may be of open loads
                tokens = sum(text.output for text in world.texts) / len(world.texts)
                fastest = max(runs[0].rate for case, runs in measured.items() if case.replicas == 1)
                for replicas in (1, 2):
                    rates = [fastest / tokens * replicas * s for s in SHARES_OF_CAPACITY]
                    cases += [Case(replicas, Arrivals(rate)) for rate in rates]
    best = {
        case: Found(
            max(run.rate for run in runs), *(min(of) for of in list(zip(*runs, strict=True))[1:])
        )
        for case, runs in measured.items()
    }
    overhead = fitted(world, {case: found for case, found in best.items() if case.fit})
    print("overhead:", overhead, f"\nload {os.getloadavg()}\n")
    report(world, best, overhead)


def usual_ms(costs: CostModel) -> float:
    """Of a plain step."""
    return costs.ms(4, 0, 100)


def known(
    args: argparse.Namespace, prompts: list[str], folder: Path
) -> tuple[World, Callable[[], CostModel]]:
    """What steps cost and what these prompts accept; and how to measure costs again."""
    record = folder / "record"
    pipeline = SpeculativePipeline(
        base_model=args.model,
        draft_mode=args.draft_mode,
        record=record,
        **({} if args.draft_mode == "none" else {"k": args.K, "controller": "fixed"}),
    )
    pipeline.generate(prompts, max_tokens=args.max_tokens, temperature=0)

    def measure() -> CostModel:
        found = [pipeline.costs(anew=True) for _ in range(3)]
        return min((costs for costs in found if costs is not None), key=usual_ms)

    recorded = Recorded(read_recording(record))
    texts = tuple(
        Text(int(prompt), int(output), trace)
        for trace, (prompt, output) in enumerate(
            zip(recorded.prompts, recorded.outputs, strict=True)
        )
    )
    levels = 0 if args.draft_mode == "none" else args.K
    setting = Setting(levels=levels, shares=False, routing="round-robin")
    acceptance = recorded if levels else Chances([0.0])
    return World(measure(), acceptance, texts, setting, args.requests), measure


def predicted(case: Case, world: World, overhead: Overhead) -> Found:
    prices = Prices(world.costs, world.acceptance.nodes, overhead)
    load = Load(world.requests, case.arrivals, texts=world.texts, in_order=True)
    setting = replace(world.setting, replicas=case.replicas)
    found = summarize(simulate(load, setting, world.acceptance, prices, model="real"))
    assert found["tpot_ms"] is not None
    return Found(found["tokens_per_second"], found["ttft_ms"]["p50"], found["tpot_ms"]["p50"])


def really(
    case: Case, world: World, servers: Sequence[Server], prompts: list[str], most: int
) -> Found:
    load = Load(world.requests, case.arrivals, texts=world.texts, in_order=True)
    arrives = Requests.of(load).arrives.tolist()
    asked = [prompts[i % len(prompts)] for i in range(world.requests)]
    some = servers[: case.replicas]
    timed, seconds = asyncio.run(ask_all(some, case.arrivals, asked, most, arrives))
    return Found(
        sum(t.tokens for t in timed) / seconds,
        median(t.first_ms for t in timed),
        median(t.tpot_ms for t in timed if t.tokens > 1),
    )


async def ask_all(
    servers: Sequence[Server],
    arrivals: Arrivals,
    prompts: Sequence[str],
    most: int,
    arrives: Sequence[float],
) -> tuple[list[Timed], float]:
    """Asks one server after the other; times of each answer, and seconds in all."""
    timed: list[Timed] = []
    idle: list[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = [[] for _ in servers]
    begun = time.perf_counter()

    async def one(number: int) -> None:
        place = number % len(servers)
        server = servers[place]
        if idle[place]:
            pair = idle[place].pop()
        else:
            pair = await asyncio.open_connection("127.0.0.1", server.port)
        timed.append(await ask(*pair, server, prompts[number], most))
        idle[place].append(pair)

    if arrivals.rate is None:
        left = iter(range(len(prompts)))

        async def client() -> None:
            for number in left:
                await one(number)

        await asyncio.gather(*(client() for _ in range(arrivals.clients)))
    else:

        async def later(number: int) -> None:
            await asyncio.sleep(begun + arrives[number] - time.perf_counter())
            await one(number)

        await asyncio.gather(*(later(number) for number in range(len(prompts))))
    seconds = time.perf_counter() - begun - (arrives[0] if len(arrives) else 0.0)
    for _, writer in (pair for pairs in idle for pair in pairs):
        writer.close()
    return timed, seconds


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


def fitted(world: World, measured: dict[Case, Found]) -> Overhead:
    """By coordinate descent, of the sum of squared relative errors."""

    def off(overhead: Overhead) -> float:
        errors = (
            have / want - 1
            for case, found in measured.items()
            for have, want in zip(predicted(case, world, overhead), found, strict=True)
        )
        return sum(error**2 for error in errors)

    names = ("scale", "step_ms", "row_ms", "request_ms", "latency_ms")
    best = Overhead(1.0, 0.1, 0.1, 0.5, 0.5)
    least = off(best)
    factor = 2.0
    while factor > 1.02:
        before = least
        for name in names:
            nothing = 0.0 if factor == 2.0 and name != "scale" else 1 / factor**2
            for by in (factor, 1 / factor, nothing):
                tried = replace(best, **{name: getattr(best, name) * by})
                found = off(tried)
                if found < least:
                    best, least = tried, found
        if least > before * 0.98:
            factor = factor**0.5
    return best


def report(world: World, measured: dict[Case, Found], overhead: Overhead) -> None:
    print("| load | tokens/s | predicted | off | TTFT | predicted | off | TPOT | predicted | off |")
    print("|---|" + "---|" * 9)
    for case, found in measured.items():
        cells = [f"{case}{' (fit)' if case.fit else ''}"]
        digits = (0, 2, 3)
        for have, want, places in zip(predicted(case, world, overhead), found, digits, strict=True):
            cells += [f"{want:.{places}f}", f"{have:.{places}f}", f"{have / want - 1:+.0%}"]
        print("| " + " | ".join(cells) + " |")


def start(number: int, args: argparse.Namespace, folder: Path, stack: ExitStack) -> Server:
    """A replica in a process of its own, until the stack is closed."""
    drafts = ["--draft-mode", args.draft_mode]
    if args.draft_mode != "none":
        drafts += ["--K", str(args.K), "--controller", "fixed"]
    words = ["inferlab", "serve", "--base-model", args.model, *drafts, "--no-prefix-sharing"]
    words += shlex.split(args.flags)
    log = folder / f"replica-{number}.log"
    return Server(start_server(words, log, stack, {"OMP_NUM_THREADS": "1"}), args.model)


if __name__ == "__main__":
    main()
