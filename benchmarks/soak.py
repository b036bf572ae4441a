"""Whether a server is at the end what it was at the beginning, after very many requests of all
kinds.

    python benchmarks/soak.py [--requests 10000] [--clients 24] [--seed 0] [--max-growth-mb 64]
        [--flag=--draft-mode=ngram ...]

Starts `inferlab serve` and sends it streams and whole answers, chats and texts, sampled and greedy
ones, stop strings, several choices, some that are wrong, and hangs up on some of them. In the end
nothing may run, wait or hold pages; the memory may not have grown by more than the bound since
half of the requests were done; and every answer must be what the same body was answered when it
was asked alone, before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from inferlab.models.assets import BUNDLED

TEMPLATE = "{% for m in messages %}# {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
PROMPTS = ("class Stack:", "import os\n", "def main(", "é日本", "x = [1, 2", "# TODO " * 30)
STOPS = ("\n\n", "self", "zzz", ")", "return")
START_SECONDS, IDLE_SECONDS = 120, 60
PAGE = os.sysconf("SC_PAGE_SIZE")
BODIES = 96
"""Different ones; each is asked many times."""

Body = dict[str, Any]


def make_body(draw: random.Random) -> tuple[str, Body]:
    """A path and a body whose answer is the same each time."""
    body: Body = {"max_tokens": draw.randint(1, 80), "seed": draw.randrange(2**32)}
    body["temperature"] = draw.choice([0, 0, 0.7, 1.5])
    optional = {
        "n": draw.randint(2, 5),
        "stop": draw.sample(STOPS, 2),
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "logit_bias": {"5": 3, "17": -100},
        "min_tokens": 1,
    }
    for name, value in optional.items():
        if draw.random() < 0.2:
            body[name] = value
    prompt = draw.choice(PROMPTS)
    if draw.random() < 0.4:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}
    if draw.random() < 0.3:
        body["echo"] = True
    return "/v1/completions", {**body, "prompt": draw.choice([prompt, [prompt, "a"], [5, 6, 7]])}


def make_wrong(draw: random.Random) -> Body:
    """A body that must be refused."""
    return draw.choice(
        [
            {"prompt": ""},
            {"prompt": "x", "max_tokens": 0},
            {"prompt": "x " * 3000},
            {"prompt": [10**6]},
            {"prompt": "x", "unknown": 1},
            {"prompt": "x", "stream": True, "temperature": -1},
        ]
    )


def texts_of(answer: httpx.Response, path: str) -> list[list[Any]]:
    """Text and reason of each choice, of a whole answer."""
    choices = answer.json()["choices"]
    chat = "chat" in path
    return [
        [choice["message"]["content"] if chat else choice["text"], choice["finish_reason"]]
        for choice in choices
    ]


def read_stream(lines: Any, path: str, choices: int, leave_at: int | None) -> list[list[Any]]:
    """The same of a stream; empty where the reader leaves at that event."""
    made: list[list[Any]] = [["", None] for _ in range(choices)]
    for count, line in enumerate(line for line in lines if line.startswith("data: ")):
        if count == leave_at:
            return []
        if line == "data: [DONE]":
            return made
        for choice in json.loads(line[6:])["choices"]:
            new = choice["delta"].get("content", "") if "chat" in path else choice["text"]
            made[choice["index"]][0] += new
            made[choice["index"]][1] = choice["finish_reason"] or made[choice["index"]][1]
    raise AssertionError("a stream ended without [DONE]")


class Soak:
    """Clients of one server, what they ask and what they should get."""

    def __init__(self, url: str, args: Any, memory: Any) -> None:
        self.args = args
        self.memory = memory
        self.after_half: int | None = None
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []
        self._http = httpx.Client(base_url=url, timeout=120, trust_env=False, limits=UNLIMITED)
        draw = random.Random(args.seed)
        self._bodies = [make_body(draw) for _ in range(BODIES)]
        self._expected = [
            texts_of(self._http.post(path, json=body).raise_for_status(), path)
            for path, body in self._bodies
        ]
        self._numbers = iter(range(args.requests))
        self._lock = threading.Lock()

    def run(self) -> None:
        """Sends all requests."""
        clients = [threading.Thread(target=self._client) for _ in range(self.args.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def metric(self, name: str) -> float:
        text = self._http.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.M))

    def busy(self) -> dict[str, float]:
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return {name: value for name in names if (value := self.metric(f"vllm:{name}"))}

    def _client(self) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
                if number == self.args.requests // 2:
                    self.after_half = self.memory()
            if number is None or self.faults:
                return
            try:
                kind = self._ask(random.Random(f"{self.args.seed} {number}"))
            except Exception as error:
                self.faults.append(f"request {number}: {type(error).__name__}: {error}")
                return
            with self._lock:
                self.seen[kind] += 1

    def _ask(self, draw: random.Random) -> str:
        if draw.random() < 0.05:
            refused = self._http.post("/v1/completions", json=make_wrong(draw))
            assert refused.status_code == 400, refused.text
            return "wrong"
        index = draw.randrange(BODIES)
        path, body = self._bodies[index]
        expected = self._expected[index]
        leaves = draw.random() < 0.15
        if draw.random() < 0.5:
            leave_at = draw.randint(0, 20) if leaves else None
            with self._http.stream("POST", path, json={**body, "stream": True}) as answer:
                assert answer.status_code == 200, f"{answer.status_code}: {answer.read()!r}"
                made = read_stream(answer.iter_lines(), path, len(expected), leave_at)
            assert not made or made == expected, f"{body}: {made} is not {expected}"
            return "stream" if made else "left stream"
        if leaves:
            try:
                wait = httpx.Timeout(60, read=draw.uniform(0.001, 0.1))
                self._http.post(path, json=body, timeout=wait)
            except httpx.ReadTimeout:
                return "left"
            return "whole"
        answer = self._http.post(path, json=body)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        made = texts_of(answer, path)
        assert made == expected, f"{body}: {made} is not {expected}"
        return "whole"


UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 where the system does not say."""
    statm = Path(f"/proc/{pid}/statm")
    return int(statm.read_text().split()[1]) * PAGE if statm.exists() else 0


def address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server is, once it is there."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        if found := re.search(r"serving \S+ on (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def run(args: Any, folder: Path) -> list[str]:
    """What went wrong."""
    shutil.copytree(BUNDLED["inferlab/tiny"], folder / "tiny")
    (folder / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    log = folder / "log"
    words = [sys.executable, "-m", "inferlab", "serve", "--port", "0"]
    words += ["--base-model", str(folder / "tiny"), *args.flag]
    with log.open("wb") as out, subprocess.Popen(words, stdout=out, stderr=out) as server:
        try:
            started = time.perf_counter()
            soak = Soak(address(server, log), args, lambda: resident(server.pid))
            soak.run()
            spent = time.perf_counter() - started
            faults = soak.faults
            if faults:
                return [*faults, f"the server's status is {server.poll()}", log.read_text()]
            end = time.monotonic() + IDLE_SECONDS
            while (busy := soak.busy()) and time.monotonic() < end:
                time.sleep(0.05)
            faults += [f"{name} is {value} at the end" for name, value in busy.items()]
            grown = (resident(server.pid) - (soak.after_half or 0)) / 2**20
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.seen.items()))
            print(f"{sum(soak.seen.values())} requests in {spent:.0f} s: {kinds}; {grown:+.1f} MB")
            if grown > args.max_growth_mb:
                faults.append(f"the memory grew by {grown:.0f} MB; {args.max_growth_mb} may be")
        finally:
            server.terminate()
        if (status := server.wait(60)) != 0:
            faults.append(f"the server ended with status {status}")
    if "Traceback" in log.read_text():
        faults.append(log.read_text())
    return faults


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24, help="that ask at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-growth-mb", type=float, default=64)
    parser.add_argument("--flag", action="append", default=[], help="of the server, as --flag=-v")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="inferlab-soak-") as folder:
        faults = run(args, Path(folder))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
