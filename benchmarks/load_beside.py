"""The load client beside `aiperf` and `guidellm`: the same requests, figures side by side.

    python benchmarks/load_beside.py --peer-python aiperf=VENV/bin/python
        [--peer-python guidellm=VENV/bin/python] [--concurrency 1,8,32] [--requests 64] [--rounds 3]
        [--tokens 40] [--gap-ms 10] [--bundle 2] [--base-url URL --model NAME [--prompts FILE]]

Peers are installed in environments of their own (`pip install aiperf`), whose Pythons are given.
By default all ask the bare server of sse_server.py, which logs when it wrote what: "server" rows
are computed from that log alone, from a request's arrival to the writes of its texts, on the same
monotonic clock. With ``--base-url`` a real server is asked, and its rows are the means of its own
``/metrics`` (vLLM's names, which `inferlab serve` has, too).

All clients define: TTFT from sending to the first chunk with text; E2E to the last chunk; TPOT as
(E2E - TTFT) / (tokens - 1) with the tokens of ``usage`` (both peers' name for it is inter-token
latency; guidellm's TPOT is E2E / tokens); tokens per second over the time from the first request to
the end of the last. guidellm sends messages in parts, which the bare server does not read: it takes
part with ``--base-url`` alone. What remains between a client's row and the server's is the network,
the client's event loop, and, where client and server share a machine's cores, what one takes from
the other: so each client's processor time is told, its start included. Runs take turns; medians
over rounds. A real server is asked once before, which counts for nothing: what it keeps of the
texts is then there for all.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import httpx

from inferlab.lengths import Lengths
from inferlab.load.prompt_sets import read_conversations
from inferlab.load.server_stats import Scrape, parse_metrics
from inferlab.load.synthetic import Synthetic, Writer, make_conversations
from inferlab.models import resolve_model_path
from inferlab.models.loading import load_tokenizer

SERVER = Path(__file__).with_name("sse_server.py")
COLUMNS = (
    *("concurrency", "who", "requests", "TTFT ms", "TTFT p50", "TTFT p99", "E2E ms", "TPOT ms"),
    *("tokens/s", "CPU s"),
)


class Figures(NamedTuple):
    """What one run came to; None: not told."""

    requests: float
    ttft_ms: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    e2e_ms: float
    tpot_ms: float | None
    tokens_per_s: float | None
    cpu_s: float | None


# --- servers --------------------------------------------------------------------------------------


@contextmanager
def paced(args: argparse.Namespace, log: Path) -> Iterator[str]:
    """The bare server, which writes its log when the block ends."""
    words = ["--tokens", args.tokens, "--gap-ms", args.gap_ms, "--bundle", args.bundle]
    command = [sys.executable, str(SERVER), "--log", str(log), *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.send_signal(signal.SIGTERM)


def of_log(log: Path) -> Figures:
    """What the server did, by what it wrote down."""
    asked: dict[str, int] = {}
    texts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "asked":
            asked[entry["prompt"]] = entry["ns"]
        elif entry["kind"] == "text":
            texts[entry["prompt"]].append((entry["ns"], entry["tokens"]))
    rows = []
    for prompt, written in texts.items():
        first, last = written[0][0], written[-1][0]
        tokens = sum(count for _, count in written)
        start = asked[prompt]
        rows.append((first - start, last - start, (last - first) / max(tokens - 1, 1), tokens))
    seconds = (max(t[-1][0] for t in texts.values()) - min(asked.values())) / 1e9
    firsts = sorted(row[0] / 1e6 for row in rows)
    return Figures(
        requests=len(rows),
        ttft_ms=mean(firsts),
        ttft_p50_ms=median(firsts),
        ttft_p99_ms=firsts[min(int(0.99 * len(firsts)), len(firsts) - 1)],
        e2e_ms=mean(row[1] for row in rows) / 1e6,
        tpot_ms=mean(row[2] for row in rows) / 1e6,
        tokens_per_s=sum(row[3] for row in rows) / seconds,
        cpu_s=None,
    )


def scrape(url: str) -> Scrape:
    return parse_metrics(httpx.get(f"{url}/metrics", timeout=30).text)


def of_metrics(before: Scrape, after: Scrape) -> Figures:
    """What a real server says of the requests between two scrapes."""

    def grown(name: str) -> float:
        values = [sum(s.value for s in one.get(name, ())) for one in (before, after)]
        return values[1] - values[0]

    def mean_ms(name: str) -> float:
        return 1e3 * grown(f"vllm:{name}_seconds_sum") / grown(f"vllm:{name}_seconds_count")

    return Figures(
        requests=grown("vllm:e2e_request_latency_seconds_count"),
        ttft_ms=mean_ms("time_to_first_token"),
        ttft_p50_ms=None,
        ttft_p99_ms=None,
        e2e_ms=mean_ms("e2e_request_latency"),
        tpot_ms=mean_ms("request_time_per_output_token"),
        tokens_per_s=None,
        cpu_s=None,
    )


# --- clients --------------------------------------------------------------------------------------


def ours(args: argparse.Namespace, url: str, texts: list[str], users: int, room: Path) -> Figures:
    prompts = room / "ours.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = [
        *("bench", "--mode", "http", "--base-url", url, "--model", args.model),
        *("--endpoint", "chat", "--conversations", prompts, "--requests", len(texts)),
        *("--concurrency", users, "--max-tokens", args.tokens, "--temperature", 0),
        *("--warmup", 0, "--extra-body", '{"ignore_eos": true}', "--no-progress", "--json"),
    ]
    out, cpu_s = timed([sys.executable, "-m", "inferlab", *map(str, words)])
    told = json.loads(out)
    spread = told["distributions"]
    return Figures(
        requests=told["requests"]["succeeded"],
        ttft_ms=spread["ttft_ms"]["mean"],
        ttft_p50_ms=spread["ttft_ms"]["p50"],
        ttft_p99_ms=spread["ttft_ms"]["p99"],
        e2e_ms=spread["e2e_ms"]["mean"],
        tpot_ms=spread["tpot_ms"]["mean"],
        tokens_per_s=told["throughput"]["output_tokens_per_s"],
        cpu_s=cpu_s,
    )


def aiperf(args: argparse.Namespace, url: str, texts: list[str], users: int, room: Path) -> Figures:
    prompts = room / "aiperf.jsonl"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = [
        *("profile", "--model", args.model, "--url", url, "--endpoint-type", "chat", "--streaming"),
        *("--input-file", prompts, "--custom-dataset-type", "single_turn"),
        *("--dataset-sampling-strategy", "sequential", "--request-count", len(texts)),
        *("--concurrency", users, "--use-legacy-max-tokens", "--use-server-token-count"),
        *("--extra-inputs", f"max_tokens:{args.tokens}", "--extra-inputs", "temperature:0"),
        *("--extra-inputs", "ignore_eos:true", "--tokenizer", resolve_model_path(args.tokenizer)),
        *("--output-artifact-dir", room / "artifacts", "--ui", "none"),
    ]
    _, cpu_s = timed([program(args, "aiperf"), *map(str, words)])
    told = json.loads((room / "artifacts" / "profile_export_aiperf.json").read_text())
    return Figures(
        requests=told["request_count"]["avg"],
        ttft_ms=told["time_to_first_token"]["avg"],
        ttft_p50_ms=told["time_to_first_token"]["p50"],
        ttft_p99_ms=told["time_to_first_token"]["p99"],
        e2e_ms=told["request_latency"]["avg"],
        tpot_ms=told["inter_token_latency"]["avg"],
        tokens_per_s=told["output_token_throughput"]["avg"],
        cpu_s=cpu_s,
    )


def guidellm(
    args: argparse.Namespace, url: str, texts: list[str], users: int, room: Path
) -> Figures:
    prompts = room / "guidellm.jsonl"
    rows = ({"prompt": text, "output_tokens_count": args.tokens} for text in texts)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = "/v1/chat/completions"
    backend = f"target={url},model={args.model},request_format={path},validate_backend=false"
    words = [
        *("run", "--disable-progress", "--backend", f"kind=openai_http,{backend}"),
        *("--profile", f"kind=concurrent,streams={users}"),
        *("--constraint", f"kind=max_requests,count={len(texts)}"),
        *("--tokenizer", f"kind=hf_auto,model={resolve_model_path(args.tokenizer)}"),
        *("--data", f"kind=json_file,path={prompts}"),
        *("--output", f"kind=json,path={room / 'guidellm.json'}"),
    ]
    _, cpu_s = timed([program(args, "guidellm"), *words])
    (told,) = json.loads((room / "guidellm.json").read_text())["benchmarks"]
    metrics = told["metrics"].items()
    of = {name: kinds["successful"] for name, kinds in metrics if "successful" in (kinds or ())}
    return Figures(
        requests=of["request_totals"],
        ttft_ms=of["time_to_first_token_ms"]["mean"],
        ttft_p50_ms=of["time_to_first_token_ms"]["percentiles"]["p50"],
        ttft_p99_ms=of["time_to_first_token_ms"]["percentiles"]["p99"],
        e2e_ms=of["request_latency"]["mean"] * 1e3,
        tpot_ms=of["inter_token_latency_ms"]["mean"],
        tokens_per_s=of["output_token_count"]["total_sum"] / told["duration"],
        cpu_s=cpu_s,
    )


CLIENTS = {"inferlab": ours, "aiperf": aiperf, "guidellm": guidellm}


def program(args: argparse.Namespace, peer: str) -> str:
    """A peer's command, beside its Python."""
    return str(Path(args.peer_python[peer]).with_name(peer))


def timed(command: list[str]) -> tuple[str, float]:
    """What a command prints, and the processor time of it and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{(done.stderr or done.stdout)[:4000]}")
    spent = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
    return done.stdout, spent


# --- the comparison -------------------------------------------------------------------------------


def prompts_of(args: argparse.Namespace) -> list[str]:
    if args.prompts:
        given = read_conversations(args.prompts, limit=args.requests)
    else:
        wanted = Synthetic(args.requests, Lengths.parse("32-128"), Lengths.parse("1"))
        given = make_conversations(wanted, Writer(load_tokenizer(args.tokenizer)))
    return [conversation.turns[0].text for conversation in given]


def measure(
    args: argparse.Namespace, client: str, texts: list[str], users: int
) -> dict[str, Figures]:
    """One run: what the client says, and what the server does."""
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        if args.base_url:
            before = scrape(args.base_url)
            said = CLIENTS[client](args, args.base_url, texts, users, room)
            did = of_metrics(before, scrape(args.base_url))
        else:
            with paced(args, room / "log") as url:
                said = CLIENTS[client](args, url, texts, users, room)
            did = of_log(room / "log")
    return {client: said, f"server, asked by {client}": did}


def run(args: argparse.Namespace) -> None:
    texts = prompts_of(args)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    clients = ["inferlab", *args.peer_python]
    if args.base_url:
        measure(args, "inferlab", texts, max(args.concurrency))
    for users in args.concurrency:
        found: dict[str, list[Figures]] = defaultdict(list)
        for turn in range(args.rounds):
            for client in reversed(clients) if turn % 2 else clients:
                for who, figures in measure(args, client, texts, users).items():
                    found[who].append(figures)
        for who in sorted(found, key=lambda who: (who.split()[-1], who)):
            cells = [_median(column) for column in zip(*found[who], strict=True)]
            print(f"| {users} | {who} | " + " | ".join(cells) + " |", flush=True)


def _median(values: tuple[Any, ...]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.4g}" if known else ""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--peer-python", required=True, action="append", metavar="PEER=PATH", help="again for more"
    )
    parser.add_argument("--base-url", help="a real server, without /v1")
    parser.add_argument("--model", default="paced")
    parser.add_argument("--tokenizer", default="inferlab/tiny", help="aiperf wants one")
    parser.add_argument("--prompts", metavar="FILE")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument(
        "--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--gap-ms", type=float, default=10)
    parser.add_argument("--bundle", type=int, default=2)
    args = parser.parse_args(words)
    args.peer_python = dict(pair.partition("=")[::2] for pair in args.peer_python)
    if unknown := args.peer_python.keys() - {"aiperf", "guidellm"}:
        parser.error(f"--peer-python: {min(unknown)} is unknown; known are aiperf and guidellm")
    if "guidellm" in args.peer_python and not args.base_url:
        parser.error("--peer-python: guidellm takes part with --base-url alone")
    run(args)


if __name__ == "__main__":
    main()
