"""`inferlab serve` beside `transformers serve`, over HTTP, on the same model and prompts.

    python benchmarks/serving.py [--model DIR] [--concurrency 1,8,32] [--requests 64] [--rounds 3]
        [--max-tokens 64] [--servers plain,inferlab,transformers,transformers-cb] [--flags "..."]
        [--prompts FILE.json] [--bare] [--long N]

The load client's closed loop: so many users, each of whom asks anew when the answer has ended. All
servers run at the same time and are measured in turns, each round the same requests in another
order; streams at temperature 0, so `inferlab` answers as `plain` does, which is itself without
drafts. Medians over rounds of: time to the first text, its 99th percentile, milliseconds per token
behind it (TPOT, the median of a round), tokens per second of all. ``bare`` is the same engine
without HTTP, one request at a time. ``--long N``: N long prompts come among the others, and a row
more has the times of the others alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from numpy import quantile

from inferlab import SpeculativePipeline
from inferlab.benchmarks.environment import describe_environment
from inferlab.lengths import Lengths
from inferlab.load.arrivals import Arrivals
from inferlab.load.conversations import Conversation, Turn
from inferlab.load.metrics import in_load, load_figures
from inferlab.load.plan import Asking, LoadPlan, TimeLimits
from inferlab.load.processes import run_load
from inferlab.load.synthetic import Synthetic, Writer, make_conversations
from inferlab.models import resolve_model_path
from inferlab.models.loading import load_tokenizer
from inferlab.training.material.corpus import heldout_prompts
from server_process import start_server

OURS = {"inferlab": [], "plain": ["--draft-mode", "none"]}
THEIRS = {"transformers": [], "transformers-cb": ["--continuous-batching"]}


class Server(NamedTuple):
    url: str
    model: str


class Round(NamedTuple):
    """Of a round: medians and the 99th percentile in ms, tokens per second."""

    first_ms: float
    first_p99_ms: float
    tpot_ms: float
    rate: float


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
    parser.add_argument("--long", type=int, default=0, help="long prompts among the others")
    parser.add_argument("--long-tokens", type=int, default=800, help="of each")
    args = parser.parse_args()
    prompts = json.loads(Path(args.prompts).read_text()) if args.prompts else heldout_prompts(40)
    print(json.dumps(describe_environment()), "\n", flush=True)
    print("| server | clients | first text, ms | p99 | TPOT, ms | tokens/s |")
    print("|---|---|---|---|---|---|", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {name: start(name, args, folder, stack) for name in args.servers.split(",")}
        for server in servers.values():
            load(server, prompts[:4], [], args.max_tokens, 2)
        bare = SpeculativePipeline(base_model=args.model) if args.bare else None
        long = long_prompts(args) if args.long else []
        for concurrency in map(int, args.concurrency.split(",")):
            rows: dict[str, list[Round]] = defaultdict(list)
            for number in range(args.rounds):
                shuffled = random.Random(number).sample(prompts, len(prompts))
                asked = [shuffled[i % len(shuffled)] for i in range(args.requests)]
                if bare is not None and concurrency == 1:
                    rows["bare"].append(alone(bare, asked, args.max_tokens))
                for name, server in servers.items():
                    few = name.startswith("transformers") and concurrency == 1
                    some = asked[: max(len(asked) // 4, 4)] if few else asked
                    for among in [[], long] if long else [[]]:
                        row = name if not among else f"{name}, {len(among)} long ones among them"
                        rows[row].append(load(server, some, among, args.max_tokens, concurrency))
            for name, rounds in rows.items():
                print(row_of(name, concurrency, rounds), flush=True)


def row_of(name: str, concurrency: int, rounds: list[Round]) -> str:
    first, worst, tpot, rate = map(median, zip(*rounds, strict=True))
    return f"| {name} | {concurrency} | {first:.2f} | {worst:.1f} | {tpot:.3f} | {rate:.0f} |"


def long_prompts(args: argparse.Namespace) -> list[str]:
    tokenizer = load_tokenizer(args.model)
    synthetic = Synthetic(
        args.long,
        Lengths.parse(str(args.long_tokens), "--long-tokens"),
        Lengths.parse(str(args.max_tokens), "--max-tokens"),
    )
    made = make_conversations(synthetic, Writer(tokenizer, args.model, 0))
    return [conversation.turns[0].text for conversation in made]


def alone(pipeline: SpeculativePipeline, prompts: list[str], most: int) -> Round:
    """What `load` measures, without a server."""
    results = []
    begun = time.perf_counter()
    for prompt in prompts:
        results.append(pipeline.generate(prompt, max_tokens=most, on_token=lambda piece: None))
    seconds = time.perf_counter() - begun
    first = [result["first_token_ms"] for result in results]
    tpot = [
        (result["latency_ms"] - result["first_token_ms"]) / max(result["num_tokens"] - 1, 1)
        for result in results
    ]
    tokens = sum(result["num_tokens"] for result in results)
    return Round(median(first), float(quantile(first, 0.99)), median(tpot), tokens / seconds)


def load(server: Server, prompts: list[str], long: list[str], most: int, concurrency: int) -> Round:
    """Asks for all texts, so many at a time; times are of the ``prompts`` alone."""
    sent = [Conversation((Turn(text),), category="short") for text in prompts]
    every = max(len(sent) // max(len(long), 1), 1)
    for place, text in enumerate(long):
        sent.insert(place * (every + 1), Conversation((Turn(text),), category="long"))
    asking = Asking(
        server.url, f"{server.url}/v1", "completions", server.model, most, 0.0,
        limits=TimeLimits(total_s=600),
    )  # fmt: skip
    plan = LoadPlan(
        asking, Arrivals("closed"), tuple(sent), count=len(sent), concurrency=concurrency
    )
    records = run_load(plan).records
    for record in records:
        if record.error is not None:
            raise RuntimeError(record.error)
    whole = load_figures(records)["throughput"]["output_tokens_per_s"]
    found = load_figures([r for r in records if in_load(r).category == "short"])["distributions"]
    first, tpot = found["ttft_ms"], found["tpot_ms"]
    if first is None or tpot is None or whole is None:
        raise RuntimeError("an answer without text or usage")
    return Round(first["p50"], first["p99"], tpot["p50"], whole)


def start(name: str, args: argparse.Namespace, folder: Path, stack: ExitStack) -> Server:
    """A server in a process of its own, until the stack is closed."""
    model = args.model
    environment = {}
    if name in OURS:
        words = ["inferlab", "serve", "--base-model", model, *OURS[name], *shlex.split(args.flags)]
    else:
        model = "local/model"
        hub = folder / "hub"
        put_into_hub_cache(Path(resolve_model_path(args.model)), hub, model)
        environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
        words = ["transformers.cli.transformers", "serve", "--device", "cpu", *THEIRS[name]]
    port = start_server(words, folder / f"{name}.log", stack, environment)
    return Server(f"http://127.0.0.1:{port}", model)


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
