"""What one client process of a load holds: chunks per second, and how late its stamps are.

    python benchmarks/load_client.py [--streams 1000] [--chunks-per-s 20000] [--seconds 10]

A server process (`benchmarks/sse_server.py`) writes to so many open streams, one chunk after the
other, and logs when; one client process, whose code is that of `inferlab bench --mode http`, reads
them. Both read one monotonic clock, so a chunk's stamp lag is the client's stamp minus the
server's right before it wrote: the socket, the waiting of the client's event loop, and nothing
else. It must hold 20,000 chunks per second of 1,000 streams with a 99th percentile below 5 ms;
the exit status says whether it did. Where server and client have no core each, it tells of that,
and of the time that a virtual machine's host took from its cores (Linux): each such gap is a lag.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from inferlab.load.arrivals import Arrivals
from inferlab.load.conversations import Conversation, Turn
from inferlab.load.plan import Asking, LoadPlan, TimeLimits
from inferlab.load.results import Clock, Shard
from inferlab.load.runner import Ran, run_shard
from inferlab.machine import usable_cores
from inferlab.records import RequestRecord

WANTED_PER_S, WANTED_P99_MS = 20_000, 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--chunks-per-s", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    per_stream = args.chunks_per_s / args.streams
    tokens = int(args.seconds * per_stream)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        words = ["--log", str(log), "--tokens", str(tokens), "--gap-ms", str(1e3 / per_stream)]
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("sse_server.py")), *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            before = stolen()
            clock, records, ran = load(port, args.streams, args.seconds)
            print_stolen(before, stolen(), ran.wall_s)
        finally:
            server.terminate()
            server.wait()
        sent = read_log(log)
    return report(clock, records, ran, sent)


def load(port: int, streams: int, seconds: float) -> tuple[Clock, list[RequestRecord], Ran]:
    """One request for each stream, all at once."""
    url = f"http://127.0.0.1:{port}"
    limits = TimeLimits(connect_s=30, total_s=60 + 4 * seconds)
    asking = Asking(url, f"{url}/v1", "chat", None, 1 << 20, 0.0, limits=limits)
    conversations = tuple(Conversation((Turn(f"stream {index}"),)) for index in range(streams))
    plan = LoadPlan(asking, Arrivals("closed"), conversations, streams, concurrency=streams)
    clock = Clock.now()
    records: list[RequestRecord] = []
    ran = run_shard(plan, Shard(clock), records.append)
    return clock, records, ran


def stolen() -> float | None:
    """Seconds that the host of a virtual machine has taken from its cores so far."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
        return int(fields[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None


def print_stolen(before: float | None, after: float | None, wall_s: float) -> None:
    if before is not None and after is not None:
        share = (after - before) / (wall_s * (os.cpu_count() or 1))
        print(f"taken by the machine's host: {share * 100:.1f} % of its cores")


def read_log(path: Path) -> dict[str, list[int]]:
    """When each chunk of each stream was written."""
    sent: dict[str, list[int]] = defaultdict(list)
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "text":
            sent[entry["prompt"]].append(entry["ns"])
    return sent


def report(
    clock: Clock,
    records: list[RequestRecord],
    ran: Ran,
    sent: dict[str, list[int]],
) -> int:
    """Prints what was held; the exit status."""
    failed = [record for record in records if record.error is not None]
    lags, stamps = [], []
    for record in records:
        written = sent[record.prompt or ""]
        started_ns = (record.started_at - clock.unix_s) * 1e9 + clock.at_ns
        came = [started_ns + at * 1e6 for at in record.text_times_ms]
        if len(came) != len(written):
            failed.append(record)
            continue
        stamps += came
        lags += [(at - ns) / 1e6 for at, ns in zip(came, written, strict=True)]
    writes = np.sort(np.concatenate([np.asarray(times) for times in sent.values()])) / 1e9
    reads = np.sort(np.asarray(stamps)) / 1e9
    # The middle: all streams are open, none has ended.
    low, high = np.quantile(writes, [0.1, 0.9])
    lag = np.asarray(lags)
    inside = (np.concatenate([np.asarray(sent[r.prompt or ""]) for r in records if r not in failed])
              / 1e9)  # fmt: skip
    middle = lag[(inside >= low) & (inside <= high)]
    offered = ((writes >= low) & (writes <= high)).sum() / (high - low)
    held = ((reads >= low) & (reads <= high)).sum() / (high - low)
    p50, p99 = np.percentile(middle, [50, 99])
    loop = np.percentile(ran.loop_lag_ms, [50, 99])
    print(f"cores: {usable_cores()}; python {sys.version.split()[0]}")
    print(f"streams: {len(records)}, chunks: {len(lag)}, failed: {len(failed)}")
    print(f"chunks/s in the middle 80 %: {offered:.0f} written, {held:.0f} read")
    print(f"stamp lag: p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {middle.max():.2f} ms")
    print(f"event-loop lag: p50 {loop[0]:.2f} ms, p99 {loop[1]:.2f} ms")
    cpu = ran.cpu_s / max(len(lag), 1) * 1e6
    print(f"client: {ran.cpu_s / ran.wall_s * 100:.0f} % of a core, {cpu:.1f} us per chunk")
    held_all = not failed and held >= 0.98 * WANTED_PER_S and p99 < WANTED_P99_MS
    print(f"must hold {WANTED_PER_S} chunks/s, p99 below {WANTED_P99_MS:g} ms: "
          + ("held" if held_all else "not held"))  # fmt: skip
    return 0 if held_all else 1


if __name__ == "__main__":
    sys.exit(main())
