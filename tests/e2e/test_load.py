"""Loads over real sockets: every class of failure, figures against a server's own log, and
`inferlab serve` on the bundled model."""

from __future__ import annotations

import asyncio
import csv
import errno
import json
import os
import re
import shlex
import signal
import socket
import ssl
import threading
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest
import trustme

from helpers.faulty_server import FaultyServer, Respond, closed_port, delta
from helpers.loads import LoggedServer, plan_of
from helpers.served import Served, chat_model
from inferlab import cli
from inferlab.load.arrivals import Arrivals
from inferlab.load.conversations import Conversation, Turn
from inferlab.load.failures import FAILURES, classify
from inferlab.load.metrics import in_load, load_figures, tpot_ms
from inferlab.load.processes import run_load
from inferlab.load.results import Clock, Shard
from inferlab.load.runner import run_shard
from inferlab.output import Journal
from inferlab.records import record_of

pytestmark = pytest.mark.network

USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
DONE = "data: [DONE]\n\n"
GOOD = Respond.events(delta(content="a"), delta(content="b"), delta("stop"), USAGE, DONE)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with FaultyServer() as running:
        running.answers = [GOOD]
        yield running


def only(outcome):
    (record,) = outcome.records
    return record


# --- every class of failure ---------------------------------------------------------------------


(TEXT,) = Respond.events(delta(content="a")).body
FAULTS = {
    "first_token_timeout": (Respond.events(delta(role="assistant"), 9.0), {"first_token_s": 0.3}),
    "stall": (Respond.events(delta(content="a"), 9.0), {"stall_s": 0.3}),
    "timeout": (Respond.events(delta(content="a"), 9.0), {"total_s": 1.0}),
    "http_status": (Respond.json({"error": "busy"}, 429, Retry_After="7"), {}),
    "error_event": (Respond.events(delta(content="a"), {"error": {"message": "full"}}), {}),
    "truncated": (Respond.events(delta(content="a")), {}),
    "malformed_json": (Respond.events(delta(content="a"), "data: {oops\n\n"), {}),
    "bad_utf8": (Respond([TEXT, b'data: {"choices": [{"text": "\xff"}]}\n\n'], length=-1), {}),
    "wrong_model": (GOOD, {"model": "second"}),
    "empty": (Respond.events(DONE), {}),
    "disconnected": (Respond(hang_up=True), {}),
    "protocol": (Respond(b"SSH-2.0-server\r\n\r\n", raw=True), {}),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_a_server_does_wrong_is_classified(server, kind):
    answer, settings = FAULTS[kind]
    server.answers = [answer]
    record = only(run_load(plan_of(server.url, **settings)))
    assert in_load(record).failure == kind, record.error
    assert record.error
    if kind in ("stall", "timeout", "error_event", "truncated", "malformed_json", "bad_utf8"):
        assert (record.text, len(record.text_times_ms)) == ("a", 1), "what came is kept"
    if kind == "http_status":
        assert record.exchange.status_code == 429
        assert in_load(record).retry_after_s == 7.0
        assert record.error == "HTTP 429: busy (Retry-After: 7)"
    assert load_figures([record])["failures"] == {kind: 1}


@pytest.mark.parametrize("processes", [1, 2])
def test_what_warms_a_server_ends_before_anything_is_counted(server, processes):
    seen = []
    plan = plan_of(server.url, "a", "b", warmup=3, concurrency=2)
    outcome = run_load(plan, processes, warm=lambda: seen.append(len(server.posts)))
    assert seen == [3]
    assert len(outcome.records) == 2
    assert len(server.posts) == 5


def test_a_page_is_no_answer(server):
    server.answers = [Respond(b"<html>hello</html>", headers={"Content-Type": "text/html"})]
    record = only(run_load(plan_of(server.url)))
    assert in_load(record).failure == "malformed_json"
    assert record.error == "the answer is text/html, neither events nor JSON"


def test_what_a_refusal_asked_for_is_kept_when_the_next_try_is_answered(server):
    server.answers = [Respond.json({"error": "busy"}, 503, Retry_After="0"), GOOD]
    record = only(run_load(plan_of(server.url, retries=1)))
    assert in_load(record).failure is None
    assert in_load(record).retry_after_s == 0.0


def test_a_stall_behind_a_late_token_is_one(server):
    server.answers = [Respond.events(delta(role="assistant"), 0.3, delta(content="a"), 9.0)]
    assert in_load(only(run_load(plan_of(server.url, stall_s=0.2)))).failure == "stall"


def test_what_goes_wrong_with_a_record_is_not_lost(server):
    def full(record):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run_load(plan_of(server.url), keep=full)
    arrivals = Arrivals("constant", rate=1000.0)
    with pytest.raises(OSError, match="the disk is full"):
        run_load(plan_of(server.url, arrivals=arrivals, concurrency=None), keep=full)
    with pytest.raises(OSError, match="the disk is full"):
        run_load(plan_of(server.url, "a", "b", concurrency=2), 2, full)


def test_a_body_shorter_than_announced_is_truncated(server):
    server.answers = [Respond(GOOD.body[:1], length=10**4)]
    assert in_load(only(run_load(plan_of(server.url)))).failure == "truncated"


def test_refused():
    with closed_port() as port:
        record = only(run_load(plan_of(f"http://127.0.0.1:{port}")))
    assert in_load(record).failure == "refused"
    assert record.counted_by is None


def test_dns():
    record = only(run_load(plan_of("http://nowhere.invalid")))
    assert in_load(record).failure == "dns"


def test_connect_timeout():
    """A listener that accepts nobody, with its queue full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        record = only(run_load(plan_of(url, connect_s=0.2)))
    assert in_load(record).failure == "connect_timeout"


def test_certificates_are_verified(monkeypatch, tmp_path):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with FaultyServer(tls=context) as server:
        server.answers = [GOOD]
        record = only(run_load(plan_of(server.url)))
        assert in_load(record).failure == "tls"
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        record = only(run_load(plan_of(server.url)))
        assert (record.error, record.text) == (None, "ab")
        assert in_load(record).connect_ms > 0


def test_a_proxy_is_used_and_shown(server, monkeypatch, capsys):
    monkeypatch.setenv("HTTP_PROXY", f"http://user:secret@127.0.0.1:{server.port}")
    words = ["--base-url", "http://elsewhere.invalid", "--model", "first", "--concurrency", "1"]
    assert cli.main([*BENCH, "--prompt", "Hi", *words, "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["proxy"] == "HTTP_PROXY"
    assert "secret" not in shown
    assert server.posts[0].path == "http://elsewhere.invalid/v1/chat/completions"
    assert server.posts[0].headers["Proxy-Authorization"].startswith("Basic ")
    with closed_port() as port:
        proxied = plan_of("http://elsewhere.invalid", proxy=f"http://127.0.0.1:{port}")
        assert in_load(only(run_load(proxied))).failure == "proxy"


def test_an_unreachable_network_is_a_class():
    key = SimpleNamespace(host="h", port=1, ssl=None, is_ssl=False)
    error = aiohttp.ClientConnectorError(key, OSError(errno.ENETUNREACH, "unreachable"))
    assert classify(error, answering=False).kind == "unreachable"
    assert classify(asyncio.TimeoutError(), answering=False).kind == "timeout"
    tested = {*FAULTS, "refused", "dns", "tls", "connect_timeout", "proxy", "unreachable"}
    assert tested | {"interrupted"} == set(FAILURES), "a class that no test covers"


def test_usage_that_is_missing_is_a_warning(server):
    server.answers = [Respond.events(delta(content="a"), delta("stop"), DONE)]
    record = only(run_load(plan_of(server.url)))
    assert (record.error, in_load(record).warnings) == (None, ["missing_usage"])
    figures = load_figures([record])
    assert figures["warnings"] == {"missing_usage": 1}
    assert figures["throughput"]["output_tokens_per_s"] is None


def test_characters_may_be_split_between_packets(server):
    event = "data: " + json.dumps(delta("stop", content="é世🌍"), ensure_ascii=False) + "\n\n"
    data = event.encode()
    pieces = [piece for i in range(len(data)) for piece in (data[i : i + 1], 0.001)]
    head = {"Content-Type": "text/event-stream"}
    server.answers = [Respond([*pieces, DONE.encode()], headers=head, length=-1)]
    record = only(run_load(plan_of(server.url)))
    assert (record.text, record.error) == ("é世🌍", None)


# --- retries, turns, budgets --------------------------------------------------------------------


def test_nothing_is_tried_again_unless_asked(server):
    busy = Respond.json({"error": "busy"}, 503, Retry_After="0")
    server.answers = [busy, busy, GOOD]
    record = only(run_load(plan_of(server.url)))
    assert (in_load(record).failure, record.exchange.attempts) == ("http_status", 1)
    server.answers = [busy, busy, GOOD]
    record = only(run_load(plan_of(server.url, retries=2)))
    assert (record.error, record.exchange.attempts) == (None, 3)
    assert "retried" in in_load(record).warnings
    assert load_figures([record])["requests"]["retries"] == 2
    assert record.exchange.elapsed_ms >= record.latency_ms
    server.answers = [Respond.json({"error": "no"}, 400)]
    assert only(run_load(plan_of(server.url, retries=2))).exchange.attempts == 1


def test_a_turn_follows_the_answer_to_the_one_before(server):
    talk = Conversation((Turn("one"), Turn("two", 5)), system="Be brief.", category="c")
    outcome = run_load(plan_of(server.url, conversations=(talk,)))
    assert [post.payload["messages"] for post in server.posts] == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "ab"},
            {"role": "user", "content": "two"},
        ],
    ]
    assert [post.payload["max_tokens"] for post in server.posts] == [8, 5]
    first, second = outcome.records
    assert in_load(second).scheduled_at >= first.started_at + first.latency_ms / 1e3
    assert [(in_load(r).turn, in_load(r).category) for r in (first, second)] == [(0, "c"), (1, "c")]
    server.answers = [Respond.json({}, 500)]
    assert len(run_load(plan_of(server.url, conversations=(talk,))).records) == 1


def test_an_open_load_keeps_its_times_and_its_limit(server):
    slow = Respond.events(delta(content="a"), 0.1, delta("stop"), USAGE, DONE)
    server.answers = [slow]
    arrivals = Arrivals("burst", rate=100, burst=4)
    outcome = run_load(plan_of(server.url, arrivals=arrivals, count=4, concurrency=2))
    scheduled = [in_load(record).scheduled_at for record in outcome.records]
    sent = [in_load(record).sent_at for record in outcome.records]
    assert np.ptp(scheduled) == 0
    assert sent[2] >= sent[0] + 0.09, "the third waits for one of the first two"
    queue = load_figures(outcome.records)["queue_ms"]
    assert queue["max"] > 90


def test_a_duration_ends_what_begins(server):
    arrivals = Arrivals("trace", at_s=(0.0, 0.05, 5.0))
    plan = plan_of(server.url, "a", "b", "c", arrivals=arrivals, concurrency=None, duration_s=0.2)
    assert [record.prompt for record in run_load(plan).records] == ["a", "b"]


BENCH = ("bench", "--mode", "http", "--no-progress", "--warmup", "0")


def bench(server: FaultyServer, *words: str) -> int:
    return cli.main([*BENCH, "--port", str(server.port), *words])


def test_an_error_budget_is_the_exit_status(server, capsys, tmp_path):
    server.answers = [GOOD, Respond.json({}, 500), GOOD]
    load = ("--prompt", "Hi", "--requests", "4", "--output", str(tmp_path / "out"))
    assert bench(server, *load) == 1
    shown = capsys.readouterr().out
    assert "failed, http_status: 1; the first: HTTP 500" in shown
    for budget in ("1", "25%"):
        server.answers = [GOOD, Respond.json({}, 500), GOOD]
        assert bench(server, *load, "--error-budget", budget) == 0
    stats = json.loads((tmp_path / "out.json").read_text())
    assert stats["requests"] == {
        "sent": 4, "succeeded": 3, "failed": 1, "interrupted": 0, "retries": 0,
    }  # fmt: skip
    again = load_figures([record_of({"record": record}) for record in stats["records"]])
    for key, value in json.loads(json.dumps(again)).items():
        assert stats[key] == value, "the figures are those of the records"
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["failure"] for row in rows].count("http_status") == 1
    assert not (tmp_path / "out.json.part").exists()


def test_a_trace_is_sent_at_its_times(server, capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"timestamp": 5000, "prompt": "a", "max_tokens": 3}\n'
        '{"timestamp": 5200, "prompt": "c"}\n{"timestamp": 5050, "prompt": "b"}\n'
    )
    assert bench(server, "--trace", str(trace), "--json") == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["settings"]["arrivals"]["kind"] == "trace"
    records = [record_of({"record": record}) for record in stats["records"]]
    assert [(record.prompt, record.max_tokens) for record in records] == [
        ("a", 3), ("b", 50), ("c", 50),
    ]  # fmt: skip
    times = [in_load(record).scheduled_at for record in records]
    assert np.diff(times) == pytest.approx([0.05, 0.15], abs=1e-5)
    assert all(in_load(record).sent_at >= at for record, at in zip(records, times, strict=True))


def test_a_sweep_doubles_until_nothing_more_comes(server, capsys, tmp_path):
    server.answers = [Respond.events(delta(content="a"), 0.02, delta("stop"), USAGE, DONE)]
    words = ("--prompt", "Hi", "--concurrency", "1", "--requests", "4", "--sweep", "100000")
    assert bench(server, *words, "--json") == 0
    stats = json.loads(capsys.readouterr().out)
    assert [row["level"] for row in stats["levels"]] == [1, 2]
    assert (stats["of"], stats["stopped"], stats["levels"][0]["gain"]) == (
        "concurrency", "saturated", None,
    )  # fmt: skip
    assert [load["settings"]["concurrency"] for load in stats["loads"]] == [1, 2]
    assert bench(server, *words, "--output", str(tmp_path / "sweep")) == 0
    shown = capsys.readouterr().out
    assert "ended: saturated" in shown
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 1 + 8
    assert cli.main(["bench", "report", str(tmp_path / "sweep.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == shown.splitlines()[-1]
    server.answers = [Respond.json({}, 500)]
    assert bench(server, *words) == 1


# --- figures against a log ----------------------------------------------------------------------


def by_kind(log: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """What a server wrote, by prompt and kind."""
    written = defaultdict(list)
    for entry in log:
        written[entry["prompt"], entry["kind"]].append(entry)
    return written


@pytest.mark.parametrize("processes", [1, 2])
def test_counts_are_those_of_the_servers_log(processes):
    texts = [f"number {index}" for index in range(12)]
    with LoggedServer("--tokens", "20", "--bundle", "3", "--gap-ms", "2") as logged:
        outcome = run_load(plan_of(logged.url, *texts, concurrency=4), processes)
        log = logged.stop()
    written = by_kind(log)
    figures = load_figures(outcome.records)
    assert figures["requests"]["succeeded"] == len(texts)
    assert {in_load(record).process for record in outcome.records} == set(range(processes))
    tokens = sum(entry["tokens"] for entry in log)
    assert figures["throughput"]["output_tokens"] == tokens == 20 * len(texts)
    chunks = [entry for entry in log if entry["kind"] == "text"]
    found = figures["distributions"]
    assert found["icl_ms"]["count"] == len(chunks) - len(texts)
    assert found["itl_ms"]["count"] == tokens - 3 * len(texts)
    assert found["tokens_per_chunk"]["mean"] == pytest.approx(20 / 7)
    assert found["connect_ms"]["count"] == 4, "a connection for each user, used again"
    for record in outcome.records:
        sizes = [entry["tokens"] for entry in written[record.prompt, "text"]]
        assert in_load(record).chunk_tokens == sizes
        assert len(record.text_times_ms) == len(sizes)
        assert record.num_tokens == sum(sizes)
    asked = [entry["ns"] for entry in log if entry["kind"] == "asked"]
    spread = max(entry["ns"] for entry in chunks) - min(asked)
    assert figures["throughput"]["duration_s"] >= spread / 1e9


def test_times_are_those_of_the_servers_log():
    """With one user all of a request lies between the log's own entries, on the machine's clock:
    sent before it was asked, each chunk read behind it was written, and the last one before the
    next request was asked. The figures are those of the log, but for what the stamps lag."""
    texts = [f"number {index}" for index in range(12)]
    clock, records = Clock.now(), []
    with LoggedServer("--tokens", "20", "--bundle", "3", "--gap-ms", "2") as logged:
        run_shard(plan_of(logged.url, *texts), Shard(clock), records.append)
        log = logged.stop()
    written = by_kind(log)
    asked_next = [written[text, "asked"][0]["ns"] for text in texts[1:]]
    for record, next_ns in zip(records, [*asked_next, np.inf], strict=True):
        sent = written[record.prompt, "text"]
        sent_ns = (record.started_at - clock.unix_s) * 1e9 + clock.at_ns
        came = sent_ns + np.asarray(record.text_times_ms) * 1e6
        wrote = np.asarray([entry["ns"] for entry in sent])
        asked = written[record.prompt, "asked"][0]["ns"]
        lag = came - wrote  # of each stamp
        rounding = 1e3  # ns: what Unix time in a float rounds to
        assert sent_ns <= asked + rounding
        assert (lag >= -rounding).all()
        assert came[-1] <= next_ns + rounding
        n = sum(entry["tokens"] for entry in sent)
        assert record.first_token_ms * 1e6 == pytest.approx(
            wrote[0] - asked + lag[0] + asked - sent_ns, abs=rounding
        )
        assert record.latency_ms * 1e6 == pytest.approx(wrote[-1] + lag[-1] - sent_ns, abs=rounding)
        together = came[0] == came[-1]  # a machine that is busy may read all at one time
        between = wrote[-1] - wrote[0] + lag[-1] - lag[0]
        per_token = None if together else pytest.approx(between / (n - 1) / 1e6, abs=rounding / 1e6)
        assert tpot_ms(record) == per_token
        assert np.asarray(record.itl_ms) * 1e6 == pytest.approx(
            np.diff(wrote) + np.diff(lag), abs=rounding
        )


def test_stamps_are_on_the_machines_clock():
    """No chunk is read before it was written, in any client process, on one axis of time."""
    with LoggedServer("--tokens", "5", "--gap-ms", "2") as logged:
        texts = [f"number {index}" for index in range(8)]
        outcome = run_load(plan_of(logged.url, *texts, concurrency=4), 2)
        log = logged.stop()
    first = {(e["prompt"], e["kind"]): e["ns"] for e in reversed(log)}
    # Unix time and monotonic clock differ by a constant; the least lag tells it from above.
    offsets = []
    for record in outcome.records:
        sent = in_load(record).sent_at
        asked = first[record.prompt, "asked"] / 1e9
        text = first[record.prompt, "text"] / 1e9
        offsets.append((sent - asked, sent + record.first_token_ms / 1e3 - text))
    latest_below = max(low for low, _ in offsets)  # sent before it was asked
    earliest_above = min(high for _, high in offsets)  # read behind it was written
    # Cores of a virtual machine may tell times that are some tenths of a millisecond apart.
    assert latest_below <= earliest_above + 1e-3


# --- Ctrl-C -------------------------------------------------------------------------------------


@contextmanager
def ctrl_c_after(count: int):
    """Sends SIGINT to this process when so many records were kept; yields ``keep``."""
    kept = threading.Semaphore(0)

    def press() -> None:
        for _ in range(count):
            kept.acquire(timeout=60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        yield lambda record: kept.release()
    finally:
        thread.join()


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_keeps_what_came(processes):
    before = signal.getsignal(signal.SIGINT)
    texts = [f"number {index}" for index in range(400)]
    with LoggedServer("--tokens", "10", "--gap-ms", "20") as logged, ctrl_c_after(4) as keep:
        outcome = run_load(plan_of(logged.url, *texts, concurrency=4), processes, keep)
    assert outcome.interrupted
    assert signal.getsignal(signal.SIGINT) == before
    kinds = [in_load(record).failure for record in outcome.records]
    assert kinds.count(None) >= 4
    assert 1 <= kinds.count("interrupted") <= 4
    assert set(kinds) == {None, "interrupted"}
    figures = load_figures(outcome.records)
    assert figures["requests"]["failed"] == 0


def test_ctrl_c_is_the_exit_status(capsys, tmp_path, monkeypatch):
    with LoggedServer("--tokens", "10", "--gap-ms", "20") as logged, ctrl_c_after(3) as keep:
        add = Journal.add
        monkeypatch.setattr(Journal, "add", lambda self, entry: (add(self, entry), keep(entry)))
        words = ["--port", str(logged.port), "--model", "paced", "--prompt", "Hi"]
        words += ["--concurrency", "2", "--duration", "60", "--output", str(tmp_path / "out")]
        assert cli.main([*BENCH, *words]) == 130
    assert "interrupted: these are partial results" in capsys.readouterr().out
    stats = json.loads((tmp_path / "out.json").read_text())
    assert stats["interrupted"] is True
    assert stats["requests"]["succeeded"] >= 3


# --- the real server ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = chat_model(tmp_path_factory.mktemp("model"))
    with Served("--base-model", str(model), "--draft-model", "inferlab/tiny-draft") as running:
        yield running


def load_on(served: Served, capsys, *words: str, code: int = 0) -> dict:
    address = ["--base-url", served.url, "--temperature", "0", "--max-tokens", "12"]
    assert cli.main([*BENCH, *address, *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_multi_turn_conversations_against_the_real_server(served, capsys, tmp_path):
    talks = tmp_path / "talks.jsonl"
    talks.write_text(
        '{"id": 1, "category": "code", "turns": ["class Stack:", "import os"]}\n'
        '{"id": 2, "category": "prose", "turns": ["Once upon a time"]}\n'
    )
    stats = load_on(
        served, capsys, "--conversations", str(talks), "--concurrency", "2", "--requests", "4",
        "--tokenizer", "inferlab/tiny", "--slo", "e2e=60000",
    )  # fmt: skip
    records = [record_of({"record": record}) for record in stats["records"]]
    assert stats["requests"]["succeeded"] == len(records) == 6
    assert {name: row["requests"] for name, row in stats["categories"].items()} == {
        "code": 4, "prose": 2,
    }  # fmt: skip
    assert stats["goodput"]["kept"] == 6
    again = stats["recount"]
    assert (again["by_tokenizer"], again["differing"]) == (again["by_usage"], 0)
    assert again["by_usage"] == stats["throughput"]["output_tokens"] == 72
    one, two = (r for r in records if in_load(r).conversation == 0)
    messages = [
        {"role": "user", "content": "class Stack:"},
        {"role": "assistant", "content": one.text},
        {"role": "user", "content": "import os"},
    ]
    body = {"messages": messages, "max_tokens": 12, "temperature": 0}
    answer = served.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == two.text
    assert answer["usage"]["prompt_tokens"] == two.prompt_tokens
    drafts = stats["acceptance"]["of_server"]
    assert drafts["source"] == "inferlab"
    assert drafts["accepted_tokens"] <= drafts["drafted_tokens"]


def test_synthetic_lengths_and_token_times_against_the_real_server(served, capsys):
    stats = load_on(
        served, capsys, "--endpoint", "completions", "--synthetic", "20,6", "--tokenizer",
        "inferlab/tiny", "--shared-prefix", "8:2", "--requests", "6", "--rate", "100",
        "--extra-body", '{"logprobs": 1, "ignore_eos": true}',
    )  # fmt: skip
    assert stats["requests"]["succeeded"] == 6
    assert {record["num_tokens"] for record in stats["records"]} == {6}
    prompts = {record["prompt_tokens"] for record in stats["records"]}
    assert prompts == {28}, "what was asked is what was sent"
    told = [record["exchange"]["load"]["chunk_tokens"] for record in stats["records"]]
    assert all(tokens is not None and sum(tokens) == 6 for tokens in told)
    assert stats["throughput"]["peak_output_tokens_per_s"] is not None
    assert stats["rates"]["asked_per_s"] == 100
    again = stats["recount"]
    assert again["prompts_by_usage"] == again["prompts_by_tokenizer"] == 6 * 28


def test_the_readmes_load(served, capsys, tmp_path):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    section = text.split("### Load on a server")[1].split("\n### ")[0]
    (command,) = re.findall(r"^inferlab bench ((?:.*\\\n)*.*)$", section, flags=re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    words[words.index("--output") + 1] = str(tmp_path / "load")
    fewer = ["--requests", "5", "--model", served.http.get("/v1/models").json()["data"][0]["id"]]
    assert cli.main(["bench", *words, *fewer, "--base-url", served.url, "--no-progress"]) == 0
    shown = capsys.readouterr().out
    printed = section.split("```")[3]
    for line in re.findall(r"^(?:load on|\| [A-Za-z0-9]+[, ]|[a-z ]+:)", printed, re.MULTILINE):
        assert re.search(f"^{re.escape(line)}", shown, re.MULTILINE), line
    assert (tmp_path / "load.json").exists()
