"""Many replicas, without Ray: who is asked, what of a request decides it, what is asked again."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from inferlab.cli import main
from inferlab.config import ConfigError
from inferlab.errors import UsageError
from inferlab.server.gate import Gate
from inferlab.server.replicas.beginnings import CHARACTERS, beginning
from inferlab.server.replicas.figures import merged
from inferlab.server.replicas.forward import Forward, NoneFree, ReplicaLost
from inferlab.server.replicas.messages import HttpCall, answers
from inferlab.server.replicas.options import Scale, from_mapping
from inferlab.server.replicas.ranking import FACTOR, SLACK, ranked

NAMES = ("a", "b", "c", "d")


def key_of(**body):
    return beginning(json.dumps(body).encode())


def test_beginnings_are_those_of_the_text():
    long = "x" * CHARACTERS
    assert key_of(prompt=long + "1") == key_of(prompt=long + "2", max_tokens=5)
    assert key_of(prompt="a") != key_of(prompt="b")
    assert key_of(prompt=["a", "b"]) == key_of(prompt="a")
    assert key_of(prompt=[[1, 2], [3]]) == key_of(prompt=[1, 2]) != key_of(prompt=[1, 3])
    chat = [{"role": "user", "content": "hello"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert key_of(messages=chat) != key_of(messages=[{"role": "system", "content": "hello"}])
    assert key_of(messages=parts).startswith("user:")
    assert key_of(input="a", instructions="b") != key_of(input="a")
    assert key_of(prompt="a", prompt_cache_key="k") == key_of(prompt="b", prompt_cache_key="k")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"\xff", b"5", b"1" * 9999, b'{"n": 1}', b'{"prompt": ""}'),
        *(b'{"prompt": null}', b'{"prompt": []}', b'{"messages": [null]}'),
        *(b"[" * 99999, b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}"),
    ],
)
def test_what_has_no_beginning_is_no_error(body):
    assert beginning(body) is None


def test_a_key_has_one_replica_and_keys_are_spread():
    idle = dict.fromkeys(NAMES, 0)
    first = {f"key {i}": ranked(f"key {i}", idle)[0] for i in range(400)}
    assert all(ranked(key, idle)[0] == name for key, name in first.items())
    shares = Counter(first.values())
    assert min(shares.values()) > 60


def test_a_replica_that_goes_moves_its_own_keys_alone():
    idle = dict.fromkeys(NAMES, 0)
    fewer = {name: 0 for name in NAMES if name != "b"}
    for i in range(200):
        before, after = ranked(f"{i}", idle)[0], ranked(f"{i}", fewer)[0]
        assert before in ("b", after)


def test_load_is_bounded_however_popular_a_beginning_is():
    loads = dict.fromkeys(NAMES, 0)
    for _ in range(200):
        loads[ranked("all alike", loads)[0]] += 1
    assert max(loads.values()) <= FACTOR * sum(loads.values()) / len(loads) + SLACK + 1
    assert min(loads.values()) > 0
    few = dict.fromkeys(NAMES, 0)
    for _ in range(SLACK):
        few[ranked("all alike", few)[0]] += 1
    assert sorted(few.values()) == [0, 0, 0, SLACK], "a few are one batch"


def test_without_a_key_the_least_loaded_is_first_and_the_avoided_last():
    loads = {"a": 3, "b": 1, "c": 2, "d": 0}
    assert ranked(None, loads) == ["d", "b", "c", "a"]
    assert ranked(None, loads, {"d"}) == ["b", "c", "a", "d"]
    assert ranked("key", loads, set(NAMES)) == ["d", "b", "c", "a"]
    assert ranked("key", {}) == []


def text_of(metric, value):
    return f'# HELP {metric} What.\n# TYPE {metric} gauge\n{metric}{{model_name="m"}} {value}\n'


def test_metrics_of_all_replicas_are_one_text():
    texts = {
        "a": text_of("x", 1) + text_of("y", 2),
        "b": text_of("x", 3) + "# HELP z Bare.\n# TYPE z gauge\nz 4.0\n",
    }
    families = list(text_string_to_metric_families(merged(texts)))
    found = {
        (family.name, sample.labels["replica"]): sample.value
        for family in families
        for sample in family.samples
    }
    assert found == {("x", "a"): 1, ("y", "a"): 2, ("x", "b"): 3, ("z", "b"): 4}
    assert [family.name for family in families] == ["x", "y", "z"]
    assert merged({}) == ""


START = {"type": "http.response.start", "status": 200, "headers": []}
STREAM = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
BUSY = {**START, "status": 503}


def body(data, more=False):
    return {"type": "http.response.body", "body": data, "more_body": more}


class Scripted:
    """Replicas that do what they are told to, one after the other."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.calls = []
        self.closed = 0

    async def ask(self, call):
        self.calls.append(call)
        script = self.scripts.pop(0)
        try:
            if isinstance(script, Exception):
                raise script
            yield f"replica {len(self.calls)}"
            for step in script:
                if isinstance(step, Exception):
                    raise step
                await asyncio.sleep(0)
                yield [step]
        finally:
            self.closed += 1

    async def figures(self):
        return {"a": text_of("x", 1)}


def answer_of(app, path="/v1/completions", sent=b'{"prompt": "hello"}', headers=()):
    """Status and body of what an application answers."""
    call = HttpCall("POST" if sent else "GET", path, b"", tuple(headers), sent)

    async def collect():
        return [message async for came in answers(app, call) for message in came]

    messages = asyncio.run(collect())
    assert [m["type"] for m in messages].count("http.response.start") == 1
    assert not messages[-1].get("more_body"), "it has an end"
    return messages[0]["status"], b"".join(m.get("body", b"") for m in messages)


def test_an_answer_is_passed_on():
    replicas = Scripted([START, body(b"one", True), body(b"two")])
    assert answer_of(Forward(replicas)) == (200, b"onetwo")
    assert replicas.calls[0].key == "hello"


def test_what_is_lost_before_anything_was_sent_is_asked_for_elsewhere():
    lost = ReplicaLost("killed")
    for script in ([lost], [START, lost], [START, body(b"half", True), lost], [STREAM, lost], lost):
        replicas = Scripted(script, [START, body(b"whole")])
        assert answer_of(Forward(replicas)) == (200, b"whole")
        assert replicas.calls[1].avoid == ({"replica 1"} if script is not lost else set())
        assert replicas.closed == 2


def test_an_answer_without_an_end_is_lost_too():
    replicas = Scripted([START, body(b"half", True)], [START, body(b"whole")])
    assert answer_of(Forward(replicas)) == (200, b"whole")


def test_it_is_not_asked_for_without_end():
    replicas = Scripted(*[[ReplicaLost("killed")]] * 9)
    status, text = answer_of(Forward(replicas, retries=2))
    assert (status, len(replicas.calls)) == (503, 3)
    assert "lost" in json.loads(text)["error"]["message"]
    assert replicas.calls[2].avoid == {"replica 1", "replica 2"}


def test_a_stream_that_has_begun_ends_with_an_error_event():
    script = [STREAM, body(b"data: 1\n\n", True), ReplicaLost("killed")]
    status, text = answer_of(Forward(Scripted(script)))
    first, last, end = text.decode().split("\n\n")
    assert (status, first, end) == (200, "data: 1", "")
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
    status, text = answer_of(Forward(Scripted(script)), "/v1/responses")
    assert text.decode().split("\n\n")[1].startswith('event: error\ndata: {"type":"error"')


def test_a_stream_is_passed_on_as_it_comes_and_whole_answers_are_not():
    sent = []

    async def send(message):
        sent.append(message)

    class Watching(Scripted):
        async def ask(self, call):
            async for came in super().ask(call):
                yield came
                counts.append(len(sent))

    for start, expected in ((STREAM, [0, 0, 2, 3, 3]), (START, [0, 0, 0, 0, 0])):
        sent.clear()
        counts: list[int] = []
        script = [start, body(b"1", True), body(b"2", True), body(b"")]
        asyncio.run(
            Forward(Watching(script))(
                HttpCall("GET", "/", b"", (), b"").scope(), receive_nothing, send
            )
        )
        assert (counts, len(sent)) == (expected, 4)


async def receive_nothing():
    return {"type": "http.request", "body": b"", "more_body": False}


def test_a_replica_that_takes_nothing_sends_the_request_to_another():
    replicas = Scripted([BUSY, body(b"no")], [START, body(b"yes")])
    assert answer_of(Forward(replicas)) == (200, b"yes")
    replicas = Scripted(*[[BUSY, body(b"no")]] * 9)
    assert answer_of(Forward(replicas, retries=1)) == (503, b"no")
    assert len(replicas.calls) == 2
    replicas = Scripted([BUSY, body(b"no")])
    assert answer_of(Forward(replicas), "/health", b"") == (503, b"no")


def test_where_nobody_takes_a_request_in_time_it_is_told_so():
    class Nobody(Scripted):
        async def ask(self, call):
            await asyncio.Event().wait()
            yield

    status, text = answer_of(Forward(Nobody(), accept_seconds=0.01))
    assert (status, json.loads(text)["error"]["type"]) == (503, "service_unavailable_error")
    status, text = answer_of(Forward(Scripted(NoneFree("9 wait"))))
    assert (status, json.loads(text)["error"]["code"]) == (429, "queue_full")


def test_keys_sizes_and_metrics_are_the_ingress_own():
    replicas = Scripted()
    app = Gate(Forward(replicas), ("secret",), 10)
    key = ((b"authorization", b"Bearer secret"),)
    assert answer_of(app)[0] == 401
    assert answer_of(app, headers=key)[0] == 413, "counted as it comes"
    status, text = answer_of(app, "/metrics", b"", key)
    assert (status, b'x{replica="a",model_name="m"} 1' in text) == (200, True)
    assert not replicas.calls


def test_closing_an_answer_ends_the_work_on_it():
    ended = []

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"text"
        try:
            await send(STREAM)
            await receive()
        finally:
            ended.append(True)

    async def run():
        stream = answers(app, HttpCall("POST", "/", b"", (), b"text"))
        assert await anext(stream) == [STREAM]
        await stream.aclose()
        await asyncio.sleep(0)

    asyncio.run(run())
    assert ended


def test_an_application_that_raises_is_not_silent():
    async def app(scope, receive, send):
        raise RuntimeError("wrong")

    async def run():
        return [came async for came in answers(app, HttpCall("GET", "/", b"", (), b""))]

    with pytest.raises(RuntimeError, match="wrong"):
        asyncio.run(run())


def test_options_come_from_one_mapping_texts_too():
    config, settings, scale = from_mapping(
        {
            "replicas": "2",
            "max_replicas": "8",
            "num_gpus": "0.5",
            "max_waiting": "64",
            "model_name": "tiny",
            "draft_mode": "ngram",
            "K": "6",
        }
    )
    assert (config.draft_mode, config.max_draft, config.share_prefixes) == ("ngram", 6, True)
    assert (settings.max_waiting, settings.model_name) == (64, "tiny")
    assert scale == Scale(replicas=2, max_replicas=8, num_gpus=0.5)
    assert (Scale(num_cpus=0.5).threads, Scale(num_cpus=4).threads) == (1, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": 0}, "replicas: "),
        ({"replicas": 4, "max_replicas": 2}, "max_replicas: must be at least"),
        ({"num_cpus": "many"}, "num_cpus: "),
        ({"max_waiting": 0}, "max_waiting"),
        ({"draft_mode": "guess"}, "draft_mode"),
    ],
)
def test_options_that_are_wrong_are_named(given, message):
    with pytest.raises((UsageError, ConfigError), match=message):
        from_mapping(given)


def run_serve(*flags):
    """`inferlab serve` where ray is not installed: its exit status and what it says."""
    code = (
        f"import sys; sys.modules['ray'] = None; from inferlab.cli import main; "
        f"sys.exit(main(['serve', *{flags!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def test_without_ray_the_extra_is_named():
    status, said = run_serve("--replicas", "2")
    assert status == 2
    assert "pip install 'llm-inference-lab[ray]'" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-replicas", "2"), "--max-replicas goes with --replicas"),
        (("--ray-address", "auto"), "--ray-address goes with --replicas"),
        (("--replicas", "0"), "--replicas: 0 is not allowed"),
        (("--replicas", "3", "--max-replicas", "2"), "--max-replicas: 2 is not allowed"),
        (("--replicas", "2", "--cpus-per-replica", "0"), "--cpus-per-replica: 0.0"),
    ],
)
def test_flags_that_do_not_go_together_are_named(flags, message, capsys):
    assert main(["serve", *flags]) == 2
    assert message in capsys.readouterr().err
